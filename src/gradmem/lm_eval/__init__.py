"""A model for lm-evaluation-harness (package `lm_eval`) that answers from memories; importing the class registers it.

`python -m gradmem.lm_eval` is the command `lm_eval` with this model, named `gradmem`.
"""

from typing import TYPE_CHECKING

from ..lazy import attach

if TYPE_CHECKING:
    from .model import GradmemLM

__all__ = ["GradmemLM"]
__getattr__ = attach(__name__, {"GradmemLM": "model"})
