"""What the methods share that read the context once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch

from ...batch import Tokens
from ...memory import Memory
from .method import Method, Written


class OnePassMethod(Method):
    """Base of methods with a single write step, one pass over the context, which descends no loss.

    Asking for more than one step yields what one step does.
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
        """The memory of nothing."""

    @abstractmethod
    def _written(self, context: Tokens) -> Memory:
        """The memory after the context."""
