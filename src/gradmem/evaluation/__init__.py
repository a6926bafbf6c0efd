"""Exact match with its interval and controls, tables and figures."""

from .evaluate import Result, evaluate

__all__ = ["Result", "evaluate"]
