"""Contexts cut into chunks, and memories in which chunks have vectors of their own."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor

from ...batch import Tokens
from ...inner.optimizers import Tensors
from ...memory import LENGTHS, Memory


@dataclass
class Chunks:
    """Contexts cut into chunks; those of a context stand one after the other.

    Attributes
    ----------
    tokens : Tokens, shape (chunks, length)
    rows, chunk_index, begins : Tensor, int64, shape (chunks,)
        The context of each chunk, which of its chunks it is, and where it begins.
    counts : Tensor, int64, shape (contexts,)
        Chunks of each context, on the CPU: shapes depend on them.
    """

    tokens: Tokens
    rows: Tensor
    chunk_index: Tensor
    begins: Tensor
    counts: Tensor

    @classmethod
    def cut(cls, context: Tokens, size: int, may_end: Tensor) -> Chunks:
        """Cut contexts after at most `size` tokens, where they may be cut; elsewhere only what is longer than a chunk.

        Parameters
        ----------
        context : Tokens, shape (batch, length)
        size : int
        may_end : Tensor, bool, shape (batch, length)
            Tokens after which a chunk may end, on any device.
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
        """Put values of the chunks' tokens (chunks, length) where they stand in the contexts; zero at pads."""
        real = self.tokens.mask
        length = context.ids.shape[1]
        at = self.begins[:, None] + torch.arange(real.shape[1], device=real.device)
        # Pads add zeros: to leave them out would wait for a device to count them.
        index = (self.rows[:, None] * length + at.clamp_max(length - 1)).flatten()
        every = values.new_zeros(context.ids.numel()).index_add(0, index, values.masked_fill(~real, 0).flatten())
        return every.view(context.ids.shape)


def _spans(ends: list[int], length: int, size: int) -> list[tuple[int, int]]:
    """Where chunks begin and stop: after the last of `ends` that fits, or after `size` tokens where none does."""
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
    """For things of which each row has so many: the row of each, and its number in the row."""
    rows = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    return rows, torch.arange(len(rows), device=counts.device) - (counts.cumsum(0) - counts)[rows]


def _index(counts: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """`ragged_index` of counts on the CPU, on the device of what they count."""
    rows, chunk_index = ragged_index(counts)
    return rows.to(like.device, non_blocking=True), chunk_index.to(like.device, non_blocking=True)


def pack(tensors: Tensors, counts: Tensor) -> Memory:
    """Chunks' tensors (chunks, ...) as a memory with so many chunks in each row."""
    return Memory({**{name: pad_rows(tensor, counts) for name, tensor in tensors.items()}, LENGTHS: counts})


def pad_rows(tensor: Tensor, counts: Tensor) -> Tensor:
    """What is of each chunk (chunks, ...) as rows (batch, most chunks, ...), padded with zeros."""
    rows = tensor.new_zeros(len(counts), int(counts.max()), *tensor.shape[1:])
    return rows.index_put(_index(counts, tensor), tensor)


def apart(memory: Memory) -> Memory:
    """Chunks with vectors of their own as rows of their own; a memory without such chunks is itself."""
    if LENGTHS not in memory.tensors:
        return memory
    counts = chunk_counts(memory)
    own = {name: tensor for name, tensor in memory.tensors.items() if name != LENGTHS}
    return Memory({name: tensor[_index(counts, tensor)] for name, tensor in own.items()})


def chunk_counts(memory: Memory) -> Tensor:
    """How many chunks of each row have vectors of their own: int64, shape (batch,), on the CPU."""
    return memory.tensors.get(LENGTHS, torch.ones(len(memory), dtype=torch.long)).cpu()
