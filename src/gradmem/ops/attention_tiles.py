"""Attention matrices in tiles of a few query rows: their slices, matrix products and work memory."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .dtypes import work_dtype
from .workspace import elements_at_once

TILE_ROWS = 64
"""Query rows of a tile on a CPU: fewer skip more of the causal triangle, more make matrix products efficient."""
TILE_BYTES = 2**20
"""Bytes of the scores of a tile on a CPU, for each thread, in the type of the products. More leave the cache; with
fewer, calling the operations costs too much."""
TILE_ROWS_ELSEWHERE, TILE_SHARE = 2048, 64
"""Rows of a tile on a GPU, and the share of its memory that the scores of a tile take (one in 64). Tiles are large
there because launching many small kernels costs more than the products that causality would spare."""


class Tiles:
    """The tiles of an attention matrix, in order, and the work memory that they share.

    The query heads that share a key head, and the positions of a tile, are rows of one matrix, so keys are never
    repeated.

    Parameters
    ----------
    query : Tensor, shape (batch, heads, queries, d)
    key : Tensor, shape (batch, key heads, keys, d)
    mask : Tensor, optional, shape (batch or 1, heads or 1, queries, keys)
    causal : bool
    """

    def __init__(self, query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> None:
        self.batch, self.heads, self.keys, _ = key.shape
        self.queries = query.shape[2]
        self.groups = query.shape[1] // self.heads
        self.causal = causal
        self.dtype, self.work, self.device = query.dtype, work_dtype(query), query.device
        self.mask = None if mask is None else self.grouped(mask)
        self.slots: dict[int, Tensor] = {}
        cpu = query.device.type == "cpu"
        rows = TILE_ROWS if cpu else TILE_ROWS_ELSEWHERE
        size = TILE_BYTES * torch.get_num_threads()
        size = size if cpu else 4 * elements_at_once(query.device, TILE_BYTES, TILE_SHARE)
        # Bytes of one position in one key head. If all samples and heads fit, tiles get more positions.
        line = self.groups * self.keys * query.element_size()
        tall = max(rows // self.groups, size // max(1, line * self.batch * self.heads))
        self.tall = max(1, min(tall, self.queries))
        matrices = max(1, size // (self.tall * line))
        # Whole samples, or some heads of a single sample.
        self.wide = _share(self.heads, matrices)
        self.deep = _share(self.batch, matrices // self.heads)
        hidden = torch.full((self.tall, self.tall), -torch.inf, dtype=self.work, device=self.device)
        self.triangle = hidden.triu_(1)[:, None]

    def __iter__(self) -> Iterator[Tile]:
        for batch in _slices(self.batch, self.deep):
            for heads in _slices(self.heads, self.wide):
                for positions in _slices(self.queries, self.tall):
                    width = self.keys - self.queries + positions.stop if self.causal else self.keys
                    yield Tile(self, batch, heads, positions, width)

    def grouped(self, tensor: Tensor) -> Tensor:
        """View (batch, heads, positions, x) as (batch, key heads, positions, groups, x); 1 head stays 1."""
        if tensor.shape[1] == 1:
            return tensor.unsqueeze(3)
        return tensor.unflatten(1, (self.heads, self.groups)).transpose(2, 3)

    def scratch(self, slot: int, shape: tuple[int, ...]) -> Tensor:
        """Return uninitialized work memory; a slot holds one matrix at a time."""
        size = math.prod(shape)
        if slot not in self.slots or self.slots[slot].numel() < size:
            whole = self.deep * self.wide * self.tall * self.groups * self.keys
            self.slots[slot] = torch.empty(max(size, whole), dtype=self.work, device=self.device)
        return self.slots[slot][:size].view(shape)


class Tile:
    """Some query positions of some samples and key heads, with the keys that they see: a batch of matrices.

    Parameters
    ----------
    owner : Tiles
    batch, heads, positions : slice
    width : int
        Number of keys, counted from the first.
    """

    def __init__(self, owner: Tiles, batch: slice, heads: slice, positions: slice, width: int) -> None:
        self.owner, self.width = owner, width
        self.some_rows, self.some_keys = (batch, heads, positions), (batch, heads, slice(width))

    def rows(self, tensor: Tensor) -> Tensor:
        """Take the tile's part of a tensor of queries, as contiguous matrices (matrices, rows, d)."""
        part = self.owner.grouped(tensor)[self.some_rows]
        # oneDNN, which computes products of low precision on CPUs, copies a strided operand for every product.
        return part.reshape(part.shape[0] * part.shape[1], -1, part.shape[4]).contiguous()

    def keys(self, tensor: Tensor) -> Tensor:
        """Take the tile's part of a tensor of keys, as contiguous matrices (matrices, keys, d)."""
        return tensor[self.some_keys].flatten(0, 1).contiguous()

    def set_rows(self, tensor: Tensor, *pairs: tuple[Tensor, Tensor]) -> None:
        """Write a sum of matrix products to the tile's part of a tensor of queries."""
        self.write_rows(tensor, self.product(4, *pairs))

    def write_rows(self, tensor: Tensor, matrices: Tensor) -> None:
        """Write to the tile's part of a tensor of queries."""
        part = self.owner.grouped(tensor)[self.some_rows]
        part.copy_(matrices.view(part.shape))

    def add_keys(self, tensor: Tensor, *pairs: tuple[Tensor, Tensor]) -> None:
        """Add a sum of matrix products to the tile's part of a tensor of keys."""
        part = tensor[self.some_keys]
        part.add_(self.product(4, *pairs).view(part.shape))

    def product(self, slot: int, *pairs: tuple[Tensor, Tensor]) -> Tensor:
        """Compute a sum of matrix products in work memory, in at least float32."""
        left, right = pairs[0]
        out = self.owner.scratch(slot, (left.shape[0], left.shape[1], right.shape[2]))
        if left.dtype == out.dtype:
            torch.bmm(left, right, out=out)
            for left, right in pairs[1:]:
                out.baddbmm_(left, right)
            return out
        out.copy_(torch.bmm(left, right))
        for left, right in pairs[1:]:
            out.add_(self.owner.scratch(5, out.shape).copy_(torch.bmm(left, right)))
        return out

    def low(self, tensor: Tensor) -> Tensor:
        """Convert a matrix to the type of the products."""
        return tensor.to(self.owner.dtype)

    def probabilities(self, query: Tensor, key: Tensor) -> Tensor:
        """Compute P in slot 0; slot 1 is overwritten."""
        owner, (batch, heads, positions) = self.owner, self.some_rows
        scores = self.product(1, (query, key.mT))
        count = positions.stop - positions.start
        if owner.mask is not None:
            whole = slice(None)
            mask = owner.mask[
                batch if owner.mask.shape[0] > 1 else whole, heads if owner.mask.shape[1] > 1 else whole, positions
            ]
            parts = scores.view(batch.stop - batch.start, -1, count, owner.groups, self.width)
            if mask.dtype == torch.bool:
                # Not minus infinity, because the softmax of a row that sees nothing would be NaN.
                parts.masked_fill_(~mask, torch.finfo(scores.dtype).min)
            else:
                parts.add_(mask)
        elif owner.causal and count > 1:
            parts = scores.view(-1, count, owner.groups, self.width)
            parts[..., self.width - count :].add_(owner.triangle[:count, :, :count])
        return torch.softmax(scores, -1, out=owner.scratch(0, scores.shape))


def _share(size: int, limit: int) -> int:
    """Return the largest number up to `limit`, at least 1, that divides `size` into about equal shares."""
    return math.ceil(size / math.ceil(size / max(1, limit))) if size else 1


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))
