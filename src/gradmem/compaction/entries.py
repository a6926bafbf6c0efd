"""Entries of a key-value cache, as many for each head as it needs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..memory import LENGTHS, Memory
from ..prefix import Prefix

TENSORS = ("keys", "values", "counts", "before", "start", LENGTHS)
"""Names of the tensors of a memory of keys and values."""


@dataclass(frozen=True)
class Entries:
    """Keys and values of one text. A head with fewer entries than others has zeros behind its own.

    Attributes
    ----------
    keys, values : Tensor, shapes (layers, key-value heads, most entries, width)
        Rotary positions are applied to the keys.
    counts : Tensor, int64, shape (layers, key-value heads)
        Entries of each head.
    start : int
        Position of the first token after them.
    places : Tensor, int64, shape (layers, key-value heads, most entries), optional
        Positions of the entries, while these are known.
    first : Tensor, int64, shape (layers, key-value heads), optional
        How many of the first entries of each head stand before the text; by default none.
    """

    keys: Tensor
    values: Tensor
    counts: Tensor
    start: int
    places: Tensor | None = None
    first: Tensor | None = None

    @property
    def before(self) -> Tensor:
        """How many of the first entries of each head stand before the text: int64, shape (layers, key-value heads)."""
        return torch.zeros_like(self.counts) if self.first is None else self.first

    def after(self, length: int) -> Entries:
        """The same entries, if so many positions stand before the text and the places are known."""
        assert self.places is not None
        first = (self.places.cpu() < length) & self.used.cpu()
        return replace(self, first=first.sum(2))

    @property
    def used(self) -> Tensor:
        """Which places hold an entry: bool, shape (layers, key-value heads, most entries)."""
        places = torch.arange(self.keys.shape[2], device=self.counts.device)
        return places < self.counts[..., None]

    def memory(self) -> Memory:
        """The entries as a memory of one row; see `gradmem.methods.compact`."""
        used = self.used.to(self.keys.device)
        total = int(self.counts.sum())
        tensors = {
            "keys": self.keys[used][None],
            "values": self.values[used][None],
            "counts": self.counts[None].cpu(),
            "before": self.before[None].cpu(),
            "start": torch.tensor([self.start]),
            LENGTHS: torch.tensor([total]),
        }
        return Memory(tensors)

    @classmethod
    def of_prefix(cls, prefix: Prefix) -> Entries:
        """The whole cache of a prefix of one row."""
        keys, values = (
            torch.stack([getattr(layer, name)[0] for layer in prefix.cache.layers]) for name in ("keys", "values")
        )
        return cls(keys, values, torch.full(keys.shape[:2], keys.shape[2]), prefix.length)

    @classmethod
    def of(cls, memory: Memory, row: int) -> Entries:
        """The entries of one row of a memory."""
        tensors = memory.tensors
        counts, total = tensors["counts"][row].cpu(), int(tensors[LENGTHS][row])
        used = torch.arange(int(counts.max())) < counts[..., None]
        padded = []
        for name in ("keys", "values"):
            flat = tensors[name][row, :total]
            dense = flat.new_zeros(*used.shape, flat.shape[-1])
            dense[used.to(flat.device)] = flat
            padded.append(dense)
        keys, values = padded
        return cls(keys, values, counts, int(tensors["start"][row]), first=tensors["before"][row].cpu())
