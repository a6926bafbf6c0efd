"""Answering many at once, from many memories."""

from typing import TYPE_CHECKING

from ..lazy import attach

if TYPE_CHECKING:
    from .engine import Busy, Closed, Engine

__all__ = ["Busy", "Closed", "Engine"]
__getattr__ = attach(__name__, dict.fromkeys(__all__, "engine"))
