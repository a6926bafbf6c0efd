"""Serving: answer many queries at once from many memories, in one process or over HTTP."""

from typing import TYPE_CHECKING

from ..lazy import attach

if TYPE_CHECKING:
    from .engine import Engine
    from .errors import Busy, Closed

__all__ = ["Busy", "Closed", "Engine"]
__getattr__ = attach(__name__, {"Busy": "errors", "Closed": "errors", "Engine": "engine"})
