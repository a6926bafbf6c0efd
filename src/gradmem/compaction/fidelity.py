"""How well a memory answers: compared with the model that has the whole text, on questions that no writer has seen."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backbone import Backbone
from ..ops.dtypes import wide
from ..prefix import Prefix
from .text import Asked

TOKENS_AT_ONCE = 64
"""Tokens whose probabilities are compared at once: a row has as many numbers as the vocabulary."""


def compared(
    unwritten: tuple[float, float], start: tuple[float, float], found: tuple[float, float], asked: Asked
) -> dict[str, float]:
    """What `Receipt.fidelity` says, from what `fidelity` measured without the text, after the first writer, and now."""
    values = {"kl_unwritten": unwritten[0], "kl_start": start[0], "kl": found[0]}
    values |= {"agreement_unwritten": unwritten[1], "agreement": found[1]}
    counts = {"questions": len(asked.queries), "tokens": len(asked.hidden)}
    return {**counts, **{name: round(value, 5) for name, value in values.items()}}


@torch.no_grad()
def fidelity(backbone: Backbone, prefix: Prefix, asked: Asked) -> tuple[float, float]:
    """KL divergence in nats per token, and how often the likeliest token is the same.

    Parameters
    ----------
    backbone : Backbone
    prefix : Prefix
        Of one row.
    asked : Asked
        Questions with the answers of the model with the whole text.
    """
    hidden = Asked.read(backbone, prefix, asked.queries, asked.answers).hidden
    divergences, same = zip(*divergence(backbone, asked.hidden, hidden), strict=True)
    return float(torch.cat(divergences).mean()), float(torch.cat(same).double().mean())


def divergence(backbone: Backbone, wanted: Tensor, found: Tensor) -> list[tuple[Tensor, Tensor]]:
    """KL divergence of each token's prediction, and whether the likeliest token is the same, in parts.

    Parameters
    ----------
    backbone : Backbone
    wanted, found : Tensor, shape (tokens, d)
        Hidden states.
    """
    parts = []
    for one, other in zip(wanted.split(TOKENS_AT_ONCE), found.split(TOKENS_AT_ONCE), strict=True):
        target, guess = (wide(backbone.head(states)).log_softmax(-1) for states in (one, other))
        parts.append(((target.exp() * (target - guess)).sum(-1), target.argmax(-1) == guess.argmax(-1)))
    return parts
