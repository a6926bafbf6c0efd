"""The chunks of a document: which of them a question reads, and how it reads them together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone import Backbone
from ..key_positions import KeyMover
from ..ops.dtypes import wide
from ..ops.head_attention import head_attention
from ..prefix import Prefix
from .entries import Entries
from .text import attention, read, scaled_queries, scores

PLAIN = "What is the text about?"
"""A question that fits any chunk as well as any other."""


@torch.no_grad()
def attention_to_chunks(
    backbone: Backbone, prefix: Prefix, chunks: Iterable[Entries], start: int, query: list[int], plain: list[int]
) -> Tensor:
    """How much more a question attends to each chunk than a question that fits any text.

    Both questions are read once, without any chunk, at the position at which they would follow the longest. For each
    head, the largest part of a token's attention that a chunk would draw counts, and the mean over all heads. What a
    chunk draws from every question, because it is long or ends late, is in both means.

    Parameters
    ----------
    backbone : Backbone
    prefix : Prefix
        What stands before every text, of one row.
    chunks : iterable of Entries
    start : int
        Position of the first token after the longest chunk.
    query : list of int
        Tokens of the question.
    plain : list of int
        Tokens of the other one.

    Returns
    -------
    Tensor, shape (chunks,)
    """
    begin, observers = torch.tensor([start], device=prefix.last.device), (_Observer(), _Observer())
    for ids, observer in zip((query, plain), observers, strict=True):
        first = Prefix.select(prefix, torch.zeros_like(begin))  # no entry of it is hidden from a head
        first.start = begin
        with head_attention(backbone.model, observer=observer):
            read(backbone, first, ids)
    asked, other = observers
    return torch.stack([asked.drawn(chunk) - other.drawn(chunk) for chunk in chunks])


class _Observer:
    """Notes the queries of tokens that are read, and the log of the attention mass that they find."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.cap: float | None = None

    def __call__(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> None:
        self.cap, queries = options.get("softcap"), scaled_queries(query[0], key.shape[1], options)
        own = scores(queries, wide(key[0]), self.cap)
        later = torch.ones(own.shape[-2:], dtype=torch.bool, device=own.device).triu(own.shape[-1] - own.shape[-2] + 1)
        self.layers[int(module.layer_idx)] = queries, own.masked_fill(later, -torch.inf).logsumexp(-1)  # type: ignore[arg-type]

    def drawn(self, chunk: Entries) -> Tensor:
        """Attention that the text of a chunk would draw from the token that looks there most: the mean over heads."""
        outside = ~chunk.used | (torch.arange(chunk.keys.shape[2]) < chunk.before[..., None])
        parts = [
            attention(queries, mass, wide(keys), self.cap, unused.to(keys.device))[0].sum(-1).amax(-1).mean()
            for (queries, mass), keys, unused in zip(
                (self.layers[layer] for layer in sorted(self.layers)), chunk.keys, outside, strict=True
            )
        ]
        return torch.stack(parts).mean()


def one_after_the_other(chunks: Sequence[Entries], mover: KeyMover, length: int) -> list[Entries]:
    """Move the keys of each chunk to the positions behind the chunk before it.

    Parameters
    ----------
    chunks : sequence of Entries
        They keep the positions of their texts, which each begin at `length`.
    mover : KeyMover
    length : int
        Positions of what stands before every text.
    """
    moved, behind = list[Entries](), 0
    for chunk in chunks:
        offset = torch.tensor(behind, device=chunk.keys.device)
        keys = torch.stack([mover.move(own, layer, offset) for layer, own in enumerate(chunk.keys)])
        moved.append(replace(chunk, keys=keys, start=chunk.start + behind))
        behind += chunk.start - length
    return moved


def together(chunks: Sequence[Entries]) -> Entries:
    """The entries of several chunks, head by head one chunk after the other.

    They keep their positions, and a question begins behind all of them. What stands before every text counts once, in
    the first chunk.
    """
    first, *others = chunks
    begins = [torch.zeros_like(first.before), *(chunk.before for chunk in others)]
    counts = torch.stack([chunk.counts - begin for chunk, begin in zip(chunks, begins, strict=True)]).sum(0)
    dense: dict[str, Tensor] = {}
    for name in ("keys", "values"):
        padded = torch.nn.utils.rnn.pad_sequence(list(_pieces(chunks, begins, name)), batch_first=True)
        dense[name] = padded.view(*counts.shape, *padded.shape[1:])
    start = max(chunk.start for chunk in chunks)
    return replace(first, **dense, counts=counts, start=start, places=None)


def _pieces(chunks: Sequence[Entries], begins: Sequence[Tensor], name: str) -> Iterator[Tensor]:
    """Keys or values of each head, of all chunks from their beginnings on."""
    layers, heads = chunks[0].counts.shape
    ranges = [(begin.tolist(), chunk.counts.tolist()) for begin, chunk in zip(begins, chunks, strict=True)]
    for layer in range(layers):
        for head in range(heads):
            yield torch.cat(
                [
                    getattr(chunk, name)[layer, head, begin[layer][head] : count[layer][head]]
                    for chunk, (begin, count) in zip(chunks, ranges, strict=True)
                ]
            )
