"""Measuring a checkpoint: exact match with interval and controls, and when to abstain."""

from typing import TYPE_CHECKING

from ..lazy import attach

if TYPE_CHECKING:
    from .measurement import evaluate
    from .result import Result

__all__ = ["Result", "evaluate"]
__getattr__ = attach(__name__, {"Result": "result", "evaluate": "measurement"})
