"""Base of methods that read the context once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch

from ...batch import Tokens
from ...memory import Memory
from .method import Method
from .written import Written


class OnePassMethod(Method):
    """Base of methods whose single write step is one pass over the context and which have no write loss.

    If more steps are asked for, one is taken.
    """

    write_steps = 1

    def trajectory(self, context: Tokens, steps: int, *, until: float | None = None) -> Iterator[Written]:
        """Yield the memory before and after the pass; see `Method.trajectory`."""
        self._check_write(context, steps)
        self._refuse_until(until)
        taken = torch.zeros_like(context.lengths)
        losses = taken.new_zeros(0, len(context), dtype=torch.float32)
        yield Written(self._unwritten(len(context)), losses, taken)
        if steps:
            yield Written(self._written(context), losses, taken + 1)

    @abstractmethod
    def _unwritten(self, batch: int) -> Memory:
        """Build the memory before the pass."""

    @abstractmethod
    def _written(self, context: Tokens) -> Memory:
        """Build the memory after the pass."""
