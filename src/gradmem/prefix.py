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
from transformers.generation.streamers import BaseStreamer

from .errors import GradmemError

if TYPE_CHECKING:
    from .backbone import Backbone

OPTIONS = (
    "do_sample",
    "early_stopping",
    "eos_token_id",
    "epsilon_cutoff",
    "eta_cutoff",
    "length_penalty",
    "max_new_tokens",
    "min_new_tokens",
    "min_p",
    "num_beams",
    "num_return_sequences",
    "streamer",
    "suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
)
"""Options of transformers' generation that look at the new tokens only and choose no cache."""


class RowStreamer(BaseStreamer):
    """A streamer of several queries that is told which of them generation runs next."""

    def begin(self, rows: list[int]) -> None:
        """What comes next is of these queries: their prompts, and after them their tokens."""
        raise NotImplementedError


class _AfterPrefix(BaseStreamer):
    """Passes on to a streamer all but the place-holders before the prompt."""

    def __init__(self, streamer: BaseStreamer, length: int) -> None:
        self.streamer, self.length = streamer, length

    def put(self, value: Tensor) -> None:
        """Take the prompt, and after it tokens."""
        self.streamer.put(value[..., self.length :])
        self.length = 0

    def end(self) -> None:
        """The answer is whole."""
        self.streamer.end()


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

    def cut(self, rows: Tensor) -> Prefix:
        """Rows of one length without their pads, where they have any; the original stays as it is."""
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
        """Positions that count, of each row."""
        lengths: list[int] = [self.length] * len(self.last) if self.mask is None else self.mask.sum(1).tolist()
        return lengths

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
    backbone: Backbone, prefix: Prefix, queries: list[list[int]], pad_id: int, streamer: Any = None, **options: Any
) -> list[list[int]]:
    """Continue each query after its prefix with `transformers` generation.

    All queries run together where pads change nothing; otherwise those of one length after prefixes of one length do.

    Parameters
    ----------
    prefix : Prefix
        One row for each query.
    queries : list of list of int
        Token ids, at least one each.
    streamer : BaseStreamer, optional
    options
        Those of `OPTIONS`, as `GenerationMixin.generate` takes them.

    Returns
    -------
    list of list of int
        The new tokens of each query (of each of its sequences, one after the other, where `num_return_sequences`
        asks for more).

    Raises
    ------
    GradmemError
        When there are other options, or transformers refuses a value.
    """
    check_options(options)
    groups = [list(range(len(queries)))]
    if not backbone.batches_uneven:
        sizes = [(length, len(query)) for length, query in zip(prefix.lengths, queries, strict=True)]
        groups = [[row for row, own in enumerate(sizes) if own == size] for size in dict.fromkeys(sizes)]
    found: list[list[list[int]]] = [[] for _ in queries]
    for rows in groups:
        if isinstance(streamer, RowStreamer):
            streamer.begin(rows)
        elif streamer is not None and len(groups) > 1:
            raise GradmemError("this model answers queries of different lengths one after the other: stream one query")
        # Generation repeats ids, mask and positions for beams and sequences, but not a cache that it is given.
        repeated = torch.tensor(rows, device=prefix.last.device).repeat_interleave(copies(options))
        own = prefix.select(repeated) if backbone.batches_uneven else prefix.cut(repeated)
        inputs = prepared(backbone, own, [queries[row] for row in rows], pad_id, copies(options))
        if streamer is not None and not isinstance(streamer, RowStreamer):
            streamer = _AfterPrefix(streamer, own.length)
        with own.active():
            generated = backbone.generate(**inputs, pad_token_id=pad_id, streamer=streamer, **options)
        new = generated[:, inputs["input_ids"].shape[1] :].tolist()
        each = len(new) // len(rows)
        for i, row in enumerate(rows):
            found[row] = new[i * each : (i + 1) * each]
    return [answer for answers in found for answer in answers]


def prepared(
    backbone: Backbone, prefix: Prefix, queries: list[list[int]], pad_id: int, copies: int = 1
) -> dict[str, Any]:
    """What transformers' generation takes to continue queries after a prefix, which stands in the cache.

    In the ids the prefix is only a run of place-holders that generation skips. Queries are padded on the left, between
    prefix and query, under the attention mask.

    Parameters
    ----------
    prefix : Prefix
        With `copies` rows for each query.
    """
    device = prefix.last.device
    longest = max(len(query) for query in queries)
    width = prefix.length + longest
    ids = torch.full((len(queries), width), pad_id, dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    mask[:, : prefix.length] = 1 if prefix.mask is None else prefix.mask[::copies]
    for row, query in enumerate(queries):
        ids[row, width - len(query) :] = torch.tensor(query, device=device)
        mask[row, width - len(query) :] = 1
    inputs = {"input_ids": ids, "attention_mask": mask, "past_key_values": prefix.cache}
    if prefix.start is not None and backbone.takes_positions:
        first = torch.tensor([width - len(query) for query in queries], device=device)
        positions = prefix.start[::copies, None] + torch.arange(width, device=device) - first[:, None]
        inputs["position_ids"] = positions.clamp_min(0)
    return inputs


def copies(options: dict[str, Any]) -> int:
    """How many times generation with these options runs each query, for beams and sequences."""
    return max(options.get("num_beams") or 1, options.get("num_return_sequences") or 1)


def check_options(options: dict[str, Any]) -> None:
    """Refuse options of generation that would look at place-holders, or bring their own cache.

    Raises
    ------
    GradmemError
        Naming the first of them.
    """
    for name in options:
        if name not in OPTIONS:
            raise GradmemError(f"answers after a memory cannot be generated with `{name}`: take {', '.join(OPTIONS)}")
