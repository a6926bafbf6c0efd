"""What stands before a query, run once: kept, selected, joined, and continued by generation."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

if TYPE_CHECKING:
    from .backbone import Backbone


class Prefix:
    """A prefix that has been run, as what follows it needs it.

    Parameters
    ----------
    last : Tensor, shape (batch, d)
        Hidden state that predicts the first token after the prefix; zeros where no position of the prefix does.
    cache : Cache
        Keys and values of the prefix's positions, of which there may be none.
    mask : Tensor, bool, shape (batch, positions), optional
        True at the positions that count; by default all.
    start : Tensor, int64, shape (batch,), optional
        Position of the first token after the prefix. By default the model counts: all positions of the prefix, or,
        where it takes no positions, those of the mask.
    """

    def __init__(self, last: Tensor, cache: Cache, mask: Tensor | None = None, start: Tensor | None = None) -> None:
        self.last = last
        self.cache = cache
        self.mask = mask
        self.start = start

    def select(self, rows: Tensor) -> Prefix:
        """Rows of the prefix, in any order and any number of times; the original stays as it is."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        cache.batch_select_indices(rows)
        mask, start = (None if tensor is None else tensor[rows] for tensor in (self.mask, self.start))
        return Prefix(self.last[rows], cache, mask, start)

    def join(self, others: Sequence[Prefix]) -> Prefix:
        """Rows of this prefix and of others that the same method has run, one after the other.

        Shorter ones are padded at the end, under the mask; the originals stay as they are.
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
        """The mask, also where all positions count: bool, shape (batch, positions)."""
        every = torch.ones(len(self.last), self.length, dtype=torch.bool, device=self.last.device)
        return every if self.mask is None else self.mask

    def _begin(self) -> Tensor:
        """The start, also where the model would count."""
        return torch.full_like(self.last[:, 0], self.length, dtype=torch.long) if self.start is None else self.start

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept for the tokens that follow; subclasses add what they keep besides."""
        layers = [layer for layer in self.cache.layers if layer.get_seq_length()]
        return sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values)) + self.last.nbytes

    def continued(self, length: int) -> dict[str, Tensor]:
        """Mask and positions for `Backbone.hidden` to run `length` tokens after the prefix, where it needs them."""
        given = {}
        if self.mask is not None:
            given["mask"] = F.pad(self.mask, (0, length), value=True)
        if self.start is not None:
            given["positions"] = self.start[:, None] + torch.arange(length, device=self.start.device)
        return given

    def active(self) -> AbstractContextManager[Any]:
        """Context in which the model runs what follows the prefix; subclasses put there what a cache cannot hold."""
        return nullcontext()

    @property
    def length(self) -> int:
        """Prefix positions."""
        return int(self.cache.get_seq_length())


def _join_layers(layers: Sequence[Any], batches: list[int], length: int) -> Any:
    """One layer of several caches as a layer of one cache, each padded with zeros at the end to `length`."""
    filled = [layer for layer in layers if layer.get_seq_length()]
    joined = copy.copy((filled or layers)[0])
    for name in ("keys", "values") if filled else ():
        like = getattr(joined, name)
        rows = like.new_zeros(sum(batches), like.shape[1], length, like.shape[3])
        for part, layer in zip(rows.split(batches), layers, strict=True):
            if layer.get_seq_length():
                part[:, :, : layer.get_seq_length()] = getattr(layer, name)
        setattr(joined, name, rows)
    return joined


def generate(
    backbone: Backbone, prefix: Prefix, queries: list[list[int]], pad_id: int, **options: Any
) -> list[list[int]]:
    """Continue each query after its prefix with `transformers` generation.

    The prefix stands in the cache; in the ids it is only a run of place-holders that generation skips. Queries are
    padded on the left, between prefix and query, under the attention mask.

    Parameters
    ----------
    prefix : Prefix
        One row for each query.
    queries : list of list of int
        Token ids, at least one each.
    options
        Arguments of `GenerationMixin.generate`.

    Returns
    -------
    list of list of int
        The new tokens of each query (of each of its sequences, one after the other, where `num_return_sequences`
        asks for more).
    """
    device = prefix.last.device
    longest = max(len(query) for query in queries)
    width = prefix.length + longest
    ids = torch.full((len(queries), width), pad_id, dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    mask[:, : prefix.length] = 1 if prefix.mask is None else prefix.mask
    for row, query in enumerate(queries):
        ids[row, width - len(query) :] = torch.tensor(query, device=device)
        mask[row, width - len(query) :] = 1
    if prefix.start is not None and backbone.takes_positions:
        first = torch.tensor([width - len(query) for query in queries], device=device)
        positions = prefix.start[:, None] + torch.arange(width, device=device) - first[:, None]
        options["position_ids"] = positions.clamp_min(0)
    # Generation repeats ids, mask and positions for beams and sequences, but not a cache that it is given.
    rows = torch.arange(len(queries), device=device).repeat_interleave(copies(options))
    prefix = prefix.select(rows)
    with prefix.active():
        generated = backbone.model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=prefix.cache, pad_token_id=pad_id, **options
        )
    sequences = generated if isinstance(generated, Tensor) else generated.sequences
    return sequences[:, width:].tolist()


def copies(options: dict[str, Any]) -> int:
    """How many times generation with these options runs each query, for beams and sequences."""
    return max(options.get("num_beams") or 1, options.get("num_return_sequences") or 1)
