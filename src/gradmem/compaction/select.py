"""Select: keep the entries of a text's cache that count most."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ..key_positions import KeyMover
from ..ops.dtypes import wide
from .entries import Entries
from .text import References, Text

LEAST = 0.3
"""With one budget for all heads: entries that each keeps, as a part of the average. `match` needs some everywhere."""

Score = Literal["contribution", "attention", "key_norm", "last"]


def select(text: Text, entries: float, metric: Tensor, score: Score, shared: bool) -> Entries:
    """Keep some entries of a text as they are.

    Parameters
    ----------
    text : Text
    entries : float
        Entries of a head, on average.
    metric : Tensor, shape (layers, key-value heads, query heads each, value width, value width)
        What a change of a head's output weighs in the output of its layer.
    score : {"contribution", "attention", "key_norm", "last"}
        How entries are ranked. contribution: mean squared attention of the reference queries, times the squared length
        of what the entry's value adds to the output of its layer. attention: mean squared attention alone (close to
        KVzip, arXiv 2505.23416). key_norm: keys of small norm first (arXiv 2406.11430). last: the newest.
    shared : bool
        Whether all heads of all layers share one budget, of which a part is given to each; if not, each keeps as many.
    """
    whole = text.whole
    ranks = _scores(text, metric, score)
    ranks[..., 0] = torch.inf  # where heads that look for nothing look
    layers, heads, length, _ = whole.keys.shape
    if shared:
        least = max(1, int(LEAST * entries))
        ranks = ranks.scatter(2, ranks.topk(least).indices, torch.inf)
        most = min(ranks.numel(), max(layers * heads * least, round(entries * layers * heads)))
        chosen = ranks.flatten().topk(most).indices
    else:
        each = min(length, max(1, round(entries)))
        first = torch.arange(layers * heads, device=ranks.device).view(layers, heads, 1) * length
        chosen = (ranks.topk(each).indices + first).flatten()
    kept = torch.zeros(ranks.numel(), dtype=torch.bool, device=ranks.device).scatter(0, chosen, True).view(ranks.shape)
    return compacted(whole, kept)


def compacted(whole: Entries, kept: Tensor) -> Entries:
    """The marked entries, in the order of the text; `kept` is bool, shape (layers, key-value heads, entries)."""
    counts = kept.sum(2)
    places = (~kept).to(torch.uint8).argsort(dim=2, stable=True)[..., : int(counts.max())]
    unused = torch.arange(places.shape[2], device=places.device) >= counts[..., None]
    keys, values = (
        tensor.take_along_dim(places[..., None], 2).masked_fill(unused[..., None], 0)
        for tensor in (whole.keys, whole.values)
    )
    return Entries(keys, values, counts.cpu(), whole.start, places)


def renumbered(entries: Entries, references: References, mover: KeyMover) -> tuple[Entries, References]:
    """Move entries to positions 0 to m - 1, and questions right behind them.

    Parameters
    ----------
    entries : Entries
        As many in every head.
    references : References
        Their queries move too.
    mover : KeyMover
    """
    count, device = entries.keys.shape[2], entries.keys.device
    assert entries.places is not None
    new = torch.arange(count, device=device)
    keys = [
        mover.move(own, layer, new - old)
        for layer, (own, old) in enumerate(zip(entries.keys, entries.places, strict=True))
    ]
    back = torch.tensor(count - entries.start, device=device)
    queries = [mover.move(own, layer, back) for layer, own in enumerate(references.queries)]
    moved = replace(entries, keys=torch.stack(keys), start=count, places=None)
    return moved, replace(references, queries=torch.stack(queries))


def _scores(text: Text, metric: Tensor, score: Score) -> Tensor:
    """How much each entry counts: shape (layers, key-value heads, entries)."""
    keys, values, seen = wide(text.whole.keys), wide(text.whole.values), text.references.seen
    if score == "last":
        return torch.arange(keys.shape[2], dtype=torch.float, device=keys.device).expand(keys.shape[:3]).clone()
    if score == "key_norm":
        return -keys.norm(dim=-1)
    if score == "attention":
        return seen.sum(2)
    added = torch.einsum("lhmd,lhrde,lhme->lhrm", values, metric, values)
    return (seen * added).sum(2)
