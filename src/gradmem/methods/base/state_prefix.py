"""A prefix that holds the state of a memory instead of keys and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from ...inner.optimizers import Tensors
from ...prefix import Prefix


class StatePrefix(Prefix):
    """A prefix without positions: what follows it depends on a state, which the method gives to the model.

    Parameters
    ----------
    state : dict of Tensor, shapes (batch, ...)
    last : Tensor, shape (batch, d)
        As for `Prefix`.
    cache : Cache
        Empty; the model fills it with what follows the prefix.
    activate : callable, optional
        `activate(state)` returns the context in which the model runs what follows the prefix.
    """

    def __init__(
        self,
        state: Tensors,
        last: Tensor,
        cache: Cache,
        activate: Callable[[Tensors], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        super().__init__(last, cache)
        self.state, self.activate = state, activate

    def select(self, rows: Tensor) -> StatePrefix:
        """Select rows in any order and any number of times; the original stays as it is."""
        state = {name: tensor[rows] for name, tensor in self.state.items()}
        return StatePrefix(state, self.last[rows], super().select(rows).cache, self.activate)

    def join(self, others: Sequence[Prefix]) -> StatePrefix:
        """Join the rows of this prefix and of others; shorter states are padded with zeros. See `Prefix.join`."""
        states = [self.state, *(other.state for other in others if isinstance(other, StatePrefix))]
        state = {name: _join([own[name] for own in states]) for name in self.state}
        joined = super().join(others)
        return StatePrefix(state, joined.last, joined.cache, self.activate)

    @property
    def nbytes(self) -> int:
        """Bytes of the state and of the last hidden state."""
        return super().nbytes + sum(tensor.nbytes for tensor in self.state.values())

    def active(self) -> AbstractContextManager[Any]:
        """Return the context in which the model runs what follows the prefix."""
        return self.activate(self.state)


def _join(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors (batch, length, ...) of different lengths, padded with zeros at the end."""
    length = max(tensor.shape[1] for tensor in tensors)
    pads = [(0, 0) * (tensor.ndim - 2) + (0, length - tensor.shape[1]) for tensor in tensors]
    return torch.cat([F.pad(tensor, pad) for tensor, pad in zip(tensors, pads, strict=True)])
