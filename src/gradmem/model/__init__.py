"""A method with its tokenizer and task: built, trained, saved, loaded, written with and asked."""

from typing import TYPE_CHECKING

from ..lazy import attach

if TYPE_CHECKING:
    from .abstain import Answer
    from .model import MemoryModel

__all__ = ["Answer", "MemoryModel"]
__getattr__ = attach(__name__, {"Answer": "abstain", "MemoryModel": "model"})
