"""Match: move the kept entries until questions find in them what they find in the whole cache (arXiv 2602.16284)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..ops.dtypes import wide
from .entries import Entries
from .text import References, attention

STEPS, RATE = 120, 0.03
"""Steps of Adam, and their rate relative to the size of a head's keys and values."""
QUERIES = 128
"""Reference queries of a step."""
RIDGE = 1e-4
"""What an error weighs in directions that the layer's output does not see, as a part of the mean weight."""
NUMBERS_AT_ONCE = 2**19
"""Most attention probabilities of a step: heads that fit are moved together."""
ALIKE = 0.75
"""Least entries of such a head, as a part of those of the one that has most."""


def match(entries: Entries, references: References, metric: Tensor) -> Entries:
    """Move keys and values by gradient descent, towards the attention outputs of the whole cache.

    Each head is moved for itself, and no step passes through the model; see `errors`. A gradient for what is returned
    passes to the start as if the moves were constants.

    Parameters
    ----------
    entries : Entries
        The start.
    references : References
    metric : Tensor, shape (layers, key-value heads, query heads each, value width, value width)
        What a change of a head's output weighs in the output of its layer.
    """
    keys, values, counts = (
        entries.keys.flatten(0, 1).clone(),
        entries.values.flatten(0, 1).clone(),
        entries.counts.flatten(),
    )
    for heads in _groups(counts, references.queries.shape[2] * QUERIES):
        most = int(counts[heads].max())
        unused = (torch.arange(most) >= counts[heads][:, None]).to(keys.device)
        start = [wide(tensor[heads, :most].detach()) for tensor in (keys, values)]
        moved = _moved(start, unused, references.of(heads), metric.flatten(0, 1)[heads])
        for tensor, before, after in zip((keys, values), start, moved, strict=True):
            tensor[heads, :most] = tensor[heads, :most] + (after - before).to(tensor.dtype)
    return replace(entries, keys=keys.view_as(entries.keys), values=values.view_as(entries.values), places=None)


def _groups(counts: Tensor, rows: int) -> Iterator[Tensor]:
    """Heads that are moved together: those with about as many entries."""
    order = counts.argsort(descending=True)
    while len(order):
        most = int(counts[order[0]])
        alike = int((counts[order] >= ALIKE * most).sum())
        size = max(1, min(alike, NUMBERS_AT_ONCE // (rows * most)))
        yield order[:size]
        order = order[size:]


@torch.enable_grad()
def _moved(start: list[Tensor], unused: Tensor, references: References, metric: Tensor) -> list[Tensor]:
    """Keys and values (heads, entries, width) after the descent."""
    root = weights_of_errors(metric)
    sizes = [sizes_of(tensor, ~unused) for tensor in start]
    moves = [torch.zeros_like(tensor, requires_grad=True) for tensor in start]
    optimizer = torch.optim.Adam(moves, lr=RATE, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(0)
    first = None
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * min(1, 2 * (1 - step / STEPS))
        given = references.some(torch.randperm(references.queries.shape[2], generator=generator)[:QUERIES])
        keys, values = (tensor + move * size for tensor, move, size in zip(start, moves, sizes, strict=True))
        losses = errors(keys, values, unused, given, root)
        first = losses.detach() + 1e-12 if first is None else first
        optimizer.zero_grad()
        (losses / first).sum().backward()
        optimizer.step()
    ends = (tensor + move.detach() * size for tensor, move, size in zip(start, moves, sizes, strict=True))
    return [end.masked_fill(unused[..., None], 0) for end in ends]


def errors(keys: Tensor, values: Tensor, unused: Tensor, references: References, root: Tensor) -> Tensor:
    """What attention over entries misses of attention over the whole cache, shape (heads,).

    The error of a query is that of its attention output over the entries and all that is outside of the text, weighed
    by what it does to the output of the layer; so the mass of attention is matched too.

    Parameters
    ----------
    keys, values : Tensor, shapes (heads, entries, width)
    unused : Tensor, bool, shape (heads, entries)
        Places without an entry.
    references : References
        Of these heads; see `References.of`.
    root : Tensor
        From `weights_of_errors`.
    """
    inside, outside = attention(references.queries, references.mass, keys, references.cap, unused)
    found = torch.einsum("hrnm,hmd->hrnd", inside, values) + outside[..., None] * references.output
    return torch.einsum("hrnd,hrde->hrne", found - references.wanted, root).square().mean((1, 2, 3))


def weights_of_errors(metric: Tensor) -> Tensor:
    """A root of each head's metric (heads, query heads each, width, width): it maps an output to what weighs alike."""
    mean = metric.diagonal(dim1=-2, dim2=-1).mean((1, 2))[:, None, None, None]
    return torch.linalg.cholesky(metric + RIDGE * mean * torch.eye(metric.shape[-1], device=metric.device))


def sizes_of(tensor: Tensor, used: Tensor) -> Tensor:
    """Root mean square of the used entries of each head, (..., entries, width) -> (..., 1, 1)."""
    count = used.sum(-1).to(tensor.device)[..., None, None] * tensor.shape[-1]
    return (tensor.square().sum((-2, -1), keepdim=True) / count).sqrt()
