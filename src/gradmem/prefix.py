"""A prefix: what stands before a query, run once and kept, so that many queries can follow it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache


class Prefix:
    """A prefix that the model has already run: the keys and values that later tokens attend to.

    Parameters
    ----------
    last : Tensor, shape (batch, d)
        Hidden state that predicts the first token after the prefix; zeros if no position of the prefix predicts it.
    cache : Cache
        Keys and values of the prefix's positions; it may be empty.
    mask : Tensor, bool, shape (batch, positions), optional
        True at real positions, False at pads; by default all are real.
    start : Tensor, int64, shape (batch,), optional
        Position of the first token after the prefix. By default the model counts for itself: all positions of the
        prefix, or, if it accepts no position ids, those that the mask marks as real.
    """

    def __init__(self, last: Tensor, cache: Cache, mask: Tensor | None = None, start: Tensor | None = None) -> None:
        self.last = last
        self.cache = cache
        self.mask = mask
        self.start = start

    def select(self, rows: Tensor) -> Prefix:
        """Select rows, in any order and any number of times; the original is unchanged."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        cache.batch_select_indices(rows)
        mask, start = (None if tensor is None else tensor[rows] for tensor in (self.mask, self.start))
        return Prefix(self.last[rows], cache, mask, start)

    def cut(self, rows: Tensor) -> Prefix:
        """Select rows of the same length and drop their pads; the original is unchanged."""
        chosen = self.select(rows)
        if chosen.mask is None:
            return chosen
        length = int(chosen.mask[0].sum())
        for layer in chosen.cache.layers if length < self.length else ():
            layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
        chosen.mask = None
        if chosen.start is not None and bool((chosen.start == length).all()):
            chosen.start = None
        return chosen

    @property
    def lengths(self) -> list[int]:
        """Number of real positions of each row."""
        lengths: list[int] = [self.length] * len(self.last) if self.mask is None else self.mask.sum(1).tolist()
        return lengths

    def join(self, others: Sequence[Prefix]) -> Prefix:
        """Concatenate the rows of this prefix and of others of the same method.

        Shorter prefixes are padded at the end, and the mask hides the pads; the originals are unchanged.
        """
        parts = [self, *others]
        batches, lengths = [len(part.last) for part in parts], [part.length for part in parts]
        cache = copy.copy(self.cache)
        layers = zip(*(part.cache.layers for part in parts), strict=True)
        cache.layers = [_join_layers(same, batches, max(lengths)) for same in layers]
        joined = Prefix(torch.cat([part.last for part in parts]), cache)
        uneven = len(set(lengths)) > 1
        if uneven or any(part.mask is not None for part in parts):
            joined.mask = torch.cat([F.pad(part.seen, (0, max(lengths) - part.length)) for part in parts])
        if uneven or any(part.start is not None for part in parts):
            joined.start = torch.cat([part._begin() for part in parts])
        return joined

    @property
    def seen(self) -> Tensor:
        """The mask as a tensor, also if all positions are real: bool, shape (batch, positions)."""
        every = torch.ones(len(self.last), self.length, dtype=torch.bool, device=self.last.device)
        return every if self.mask is None else self.mask

    def _begin(self) -> Tensor:
        """The start as a tensor, also if the model counts for itself."""
        return torch.full_like(self.last[:, 0], self.length, dtype=torch.long) if self.start is None else self.start

    @property
    def nbytes(self) -> int:
        """Bytes of the kept tensors; a subclass adds what it keeps besides keys and values."""
        layers = [layer for layer in self.cache.layers if layer.get_seq_length()]
        return sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values)) + self.last.nbytes

    def continued(self, length: int) -> dict[str, Tensor]:
        """Arguments `mask` and `positions` of `Backbone.hidden` for `length` tokens after the prefix, if needed."""
        given = {}
        if self.mask is not None:
            given["mask"] = F.pad(self.mask, (0, length), value=True)
        if self.start is not None:
            given["positions"] = self.start[:, None] + torch.arange(length, device=self.start.device)
        return given

    def active(self) -> AbstractContextManager[Any]:
        """Context in which the model runs later tokens; a subclass loads here what a cache cannot hold."""
        return nullcontext()

    @property
    def length(self) -> int:
        """Positions of the prefix, pads included."""
        return int(self.cache.get_seq_length())

    @property
    def end(self) -> int:
        """Positions that come before the first token after the prefix, or that the cache holds: the larger number."""
        return self.length if self.start is None else max(self.length, int(self.start.max()))

    def generation_inputs(
        self, queries: list[list[int]], pad_id: int, *, positions: bool, copies: int = 1
    ) -> dict[str, Any]:
        """Arguments with which `generate` of transformers continues queries after this prefix.

        The prefix itself is in the cache; in the ids it is a run of pad tokens, which generation skips. Queries are
        padded on the left, between prefix and query, and the attention mask hides these pads.

        Parameters
        ----------
        queries : list of list of int
        pad_id : int
        positions : bool
            Whether the model accepts position ids.
        copies : int
            Rows of this prefix for each query, one after the other.
        """
        device = self.last.device
        width = self.length + max(len(query) for query in queries)
        ids = torch.full((len(queries), width), pad_id, dtype=torch.long, device=device)
        mask = torch.zeros_like(ids)
        mask[:, : self.length] = 1 if self.mask is None else self.mask[::copies]
        for row, query in enumerate(queries):
            ids[row, width - len(query) :] = torch.tensor(query, device=device)
            mask[row, width - len(query) :] = 1
        inputs = {"input_ids": ids, "attention_mask": mask, "past_key_values": self.cache}
        if self.start is not None and positions:
            first = torch.tensor([width - len(query) for query in queries], device=device)
            counted = self.start[::copies, None] + torch.arange(width, device=device) - first[:, None]
            inputs["position_ids"] = counted.clamp_min(0)
        return inputs


def _join_layers(layers: Sequence[Any], batches: list[int], length: int) -> Any:
    """Concatenate one layer of several caches, each padded with zeros at the end to `length`."""
    filled = [layer for layer in layers if layer.get_seq_length()]
    joined = copy.copy((filled or layers)[0])
    for name in ("keys", "values") if filled else ():
        like = getattr(joined, name)
        parts = [
            F.pad(getattr(layer, name), (0, 0, 0, length - layer.get_seq_length()))
            if layer.get_seq_length()
            else like.new_zeros(batch, like.shape[1], length, like.shape[3])
            for layer, batch in zip(layers, batches, strict=True)
        ]
        setattr(joined, name, torch.cat(parts))
    return joined
