"""Answering many at once, from many memories."""

from .engine import Busy, Closed, Engine

__all__ = ["Busy", "Closed", "Engine"]
