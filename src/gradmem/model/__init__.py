"""A memory method with its task: built, loaded and saved; and memories that are bound to it, to be asked."""

from typing import TYPE_CHECKING

from ..lazy import attach

if TYPE_CHECKING:
    from .model import BoundMemory, MemoryModel
    from .reading import Answer

__all__ = ["Answer", "BoundMemory", "MemoryModel"]
__getattr__ = attach(__name__, {"Answer": "reading", "BoundMemory": "model", "MemoryModel": "model"})
