"""The keys and values that stand before a query, as other programs keep them: the same number in every head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..compaction.entries import TENSORS
from ..errors import GradmemError
from ..memory import Memory
from ..methods.base.head_prefix import HeadPrefix
from ..methods.base.state_prefix import StatePrefix
from ..model import BoundMemory
from ..prefix import Prefix


def is_compacted(memory: Memory) -> bool:
    """Whether a memory is one of `compact`, which needs no model to be exported."""
    return set(memory.tensors) == set(TENSORS)


@dataclass(frozen=True)
class KeysValues:
    """Keys and values of the positions 0 to m - 1; a query begins at position m.

    Attributes
    ----------
    keys, values : Tensor, shapes (layers, key-value heads, m, width)
        Rotary positions are applied to the keys.
    """

    keys: Tensor
    values: Tensor

    @property
    def entries(self) -> int:
        """Positions, m."""
        return self.keys.shape[2]


def keys_values(memory: Memory) -> KeysValues:
    """Take the keys and values that READ puts before a query.

    Parameters
    ----------
    memory : Memory
        A memory of `compact`, or a `BoundMemory` of any method that reads through keys and values.

    Raises
    ------
    GradmemError
        If the memory has several rows, its heads keep different numbers of entries, or a query does not begin right
        after them.
    """
    if len(memory) != 1:
        raise GradmemError(
            f"the memory has {len(memory)} chunks, and an export holds one: write a shorter text, or one chunk alone"
        )
    if is_compacted(memory):
        found = _of_compact(memory)
    elif isinstance(memory, BoundMemory):
        found = _of_prefix(memory.prefix)
    else:
        raise GradmemError("a memory without keys and values has to be bound to its model: see `gradmem.open`")
    if not bool(found.keys.isfinite().all() and found.values.isfinite().all()):
        raise GradmemError("the memory has numbers that are not finite: write it again")
    return found


def _of_compact(memory: Memory) -> KeysValues:
    found = memory.tensors
    keys, values, counts = (found[name][0] for name in ("keys", "values", "counts"))
    entries = int(counts.flatten()[0])
    if bool((counts != entries).any()):
        raise GradmemError("the heads of the memory keep different numbers of entries: write it with --shared false")
    _check_start(int(found["start"]), entries)
    return KeysValues(keys.view(*counts.shape, entries, -1), values.view(*counts.shape, entries, -1))


def _of_prefix(prefix: Prefix) -> KeysValues:
    if isinstance(prefix, StatePrefix):
        raise GradmemError("the memory is a state of its method, which no other program has: write it with another one")
    if isinstance(prefix, HeadPrefix) and bool(prefix.hidden.any()):
        raise GradmemError("some layers or heads see a part of the memory only, which no other program can be told")
    _check_start(prefix.end, prefix.length)
    layers = prefix.cut(torch.tensor([0], device=prefix.last.device)).cache.layers
    if len({(layer.keys.shape, layer.values.shape) for layer in layers}) > 1:
        raise GradmemError("the model's layers keep keys and values of different shapes, which no target can hold")
    keys, values = (torch.stack([getattr(layer, name)[0] for layer in layers]) for name in ("keys", "values"))
    return KeysValues(keys, values)


def _check_start(start: int, entries: int) -> None:
    if start != entries:
        raise GradmemError(
            f"questions to the memory start at position {start}, and those to an export right after its {entries} "
            "entries: write it with --shared false --positions memory"
        )
