"""Exact match with its interval and controls, tables and figures."""

from typing import TYPE_CHECKING

from ..lazy import attach

if TYPE_CHECKING:
    from .measurement import Result, evaluate

__all__ = ["Result", "evaluate"]
__getattr__ = attach(__name__, dict.fromkeys(__all__, "measurement"))
