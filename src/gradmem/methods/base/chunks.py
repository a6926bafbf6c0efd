"""Split contexts into chunks, and handle memories in which each chunk has vectors of its own."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...batch import Tokens
from ...inner.optimizers import Tensors
from ...memory import LENGTHS, Memory

ChunkMode = Literal["sequential", "growing", "independent", "joint", "parallel"]
"""How the chunks of a context are written into one memory; see `ChunkedMethod`."""


@dataclass
class Chunks:
    """Contexts that are split into chunks. The chunks of a context follow one another.

    Attributes
    ----------
    tokens : Tokens, shape (chunks, length)
    rows : Tensor, int64, shape (chunks,)
        The context that each chunk belongs to.
    chunk_index : Tensor, int64, shape (chunks,)
        The position of each chunk among the chunks of its context.
    begins : Tensor, int64, shape (chunks,)
        The position in the context at which each chunk begins.
    counts : Tensor, int64, shape (contexts,)
        Number of chunks of each context. It is on the CPU because shapes depend on it.
    """

    tokens: Tokens
    rows: Tensor
    chunk_index: Tensor
    begins: Tensor
    counts: Tensor

    @classmethod
    def cut(cls, context: Tokens, size: int, may_end: Tensor) -> Chunks:
        """Split contexts into chunks of at most `size` tokens.

        A chunk ends where `may_end` allows it, or after `size` tokens if it allows no earlier end.

        Parameters
        ----------
        context : Tokens, shape (batch, length)
        size : int
        may_end : Tensor, bool, shape (batch, length)
            Whether a chunk may end after each token, on any device.
        """
        device, length, context = context.ids.device, context.ids.shape[1], context.values
        spans = [
            _spans([i for i, end in enumerate(ends, 1) if end], real, size)
            for ends, real in zip(may_end.tolist(), context.lengths.tolist(), strict=True)
        ]
        counts = torch.tensor([len(own) for own in spans])
        rows, chunk_index = ragged_index(counts)
        bounds = torch.tensor([span for own in spans for span in own])
        at = bounds[:, :1] + torch.arange(int((bounds[:, 1] - bounds[:, 0]).max()))
        ids = context.ids[rows[:, None].to(context.ids.device), at.clamp_max(length - 1).to(context.ids.device)]
        tokens = Tokens(ids, (at < bounds[:, 1:]).to(ids.device)).to(device)
        rows, chunk_index, begins = torch.stack([rows, chunk_index, bounds[:, 0]]).to(device, non_blocking=True)
        return cls(tokens, rows, chunk_index, begins, counts)

    def rejoined(self, values: Tensor, context: Tokens) -> Tensor:
        """Put values of the chunks' tokens (chunks, length) at their positions in the contexts; pads get zero."""
        real = self.tokens.mask
        length = context.ids.shape[1]
        at = self.begins[:, None] + torch.arange(real.shape[1], device=real.device)
        # Pads add zeros: to leave them out would wait for a device to count them.
        index = (self.rows[:, None] * length + at.clamp_max(length - 1)).flatten()
        every = values.new_zeros(context.ids.numel()).index_add(0, index, values.masked_fill(~real, 0).flatten())
        return every.view(context.ids.shape)


def _spans(ends: list[int], length: int, size: int) -> list[tuple[int, int]]:
    """Find where each chunk begins and stops: at the last of `ends` that fits, or after `size` tokens if none does."""
    spans, begin = [], 0
    while begin < length:
        stop = begin + size
        if stop < length:
            fits = bisect_right(ends, stop)
            stop = ends[fits - 1] if fits and ends[fits - 1] > begin else stop
        spans.append((begin, min(stop, length)))
        begin = stop
    return spans


def ragged_index(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Index items of rows that have `counts` items each: the row of each item, and its position in the row."""
    rows = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    return rows, torch.arange(len(rows), device=counts.device) - (counts.cumsum(0) - counts)[rows]


def _index(counts: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `ragged_index` from counts on the CPU and move it to the device of `like`."""
    rows, chunk_index = ragged_index(counts)
    return rows.to(like.device, non_blocking=True), chunk_index.to(like.device, non_blocking=True)


def pack(tensors: Tensors, counts: Tensor) -> Memory:
    """Turn tensors of chunks (chunks, ...) into a memory whose rows have `counts` chunks each."""
    return Memory({**{name: pad_rows(tensor, counts) for name, tensor in tensors.items()}, LENGTHS: counts})


def pad_rows(tensor: Tensor, counts: Tensor) -> Tensor:
    """Turn a tensor of chunks (chunks, ...) into rows (batch, most chunks, ...), padded with zeros."""
    rows = tensor.new_zeros(len(counts), int(counts.max()), *tensor.shape[1:])
    return rows.index_put(_index(counts, tensor), tensor)


def split_chunks(memory: Memory) -> Memory:
    """Make each chunk that has vectors of its own a row; a memory without such chunks is returned as it is."""
    if LENGTHS not in memory.tensors:
        return memory
    counts = chunk_counts(memory)
    own = {name: tensor for name, tensor in memory.tensors.items() if name != LENGTHS}
    return Memory({name: tensor[_index(counts, tensor)] for name, tensor in own.items()})


def chunk_counts(memory: Memory) -> Tensor:
    """Count the chunks of each row that have vectors of their own: int64, shape (batch,), on the CPU."""
    return memory.tensors.get(LENGTHS, torch.ones(len(memory), dtype=torch.long)).cpu()
