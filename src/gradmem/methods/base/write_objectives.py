"""What WRITE descends with a start that is made from the context."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...backbone import Backbone
from ...batch import Tokens
from ...compaction.match import errors, weights_of_errors
from ...compaction.study import answer_loss
from ...compaction.text import Asked, References
from ...inner.objective import sample_losses
from ...ops.dtypes import no_autocast, wide
from ...prefix import Prefix


@dataclass
class Given:
    """What is known of the contexts of a batch while they are written.

    Attributes
    ----------
    backbone : Backbone
    context : Tokens, shape (batch, length)
    used : Tensor, bool, shape (batch, layers, key-value heads, entries)
        Which places hold an entry.
    references : list of References
        What the model looks for in each context.
    asked : list of Asked
        Questions about each context, with the answers of the model that has read it.
    metric : Tensor, shape (layers, key-value heads, query heads each, value width, value width)
        What a change of a head's output weighs in the output of its layer.
    repeat_losses : callable
        `repeat_losses(prefix, context)` is the loss of each token of a context when it is repeated, (batch, length).
    prefix : callable
        `prefix(keys, values)` puts entries before what follows, differentiably.
    start : tuple of Tensor
        Keys and values before the first step.
    """

    backbone: Backbone
    context: Tokens
    used: Tensor
    references: list[References]
    asked: list[Asked]
    metric: Tensor
    repeat_losses: Callable[[Prefix, Tokens], Tensor]
    prefix: Callable[[Tensor, Tensor], Prefix]
    start: tuple[Tensor, Tensor]

    @cached_property
    def root(self) -> Tensor:
        """See `weights_of_errors`."""
        with no_autocast(self.metric):
            return weights_of_errors(self.metric.flatten(0, 1))

    @cached_property
    def first_errors(self) -> Tensor:
        """Each head's error before the first step, shape (batch, heads): attention is measured by it."""
        with torch.no_grad():
            return self.errors(*self.start)

    def errors(self, keys: Tensor, values: Tensor) -> Tensor:
        """See `gradmem.compaction.match.errors`: shape (batch, heads) over the heads of all layers."""
        with no_autocast(keys):
            return torch.stack([self._errors(row, keys, values) for row in range(len(keys))])

    def _errors(self, row: int, keys: Tensor, values: Tensor) -> Tensor:
        own_keys, own_values = (wide(tensor[row]).flatten(0, 1) for tensor in (keys, values))
        return errors(own_keys, own_values, ~self.used[row].flatten(0, 1), self.references[row].flat(), self.root)


def reconstruction(given: Given, keys: Tensor, values: Tensor) -> Tensor:
    """Mean loss of the context's tokens when the model is asked to repeat it, in nats."""
    losses = given.repeat_losses(given.prefix(keys, values), given.context)
    return sample_losses(losses, given.context.mask)


def attention(given: Given, keys: Tensor, values: Tensor) -> Tensor:
    """Mean over all heads of the squared error of their outputs, relative to that before the first step.

    No pass through the model. Targets are constants: a meta-gradient passes through the entries alone.
    """
    return (given.errors(keys, values) / (given.first_errors + 1e-12)).mean(1)


def answers(given: Given, keys: Tensor, values: Tensor) -> Tensor:
    """Mean KL divergence to the model with the whole context along its answers to questions about it, in nats."""
    prefix, losses = given.prefix(keys, values), []
    for row, asked in enumerate(given.asked):
        own = prefix.cut(torch.tensor([row], device=keys.device))
        losses.append(answer_loss(given.backbone, own, list(asked.each())))
    return torch.stack(losses)


OBJECTIVES: dict[str, Callable[[Given, Any, Any], Tensor]] = {
    "reconstruction": reconstruction,
    "attention": attention,
    "answers": answers,
}
"""Losses of shape (batch,) by name, of keys and values (batch, layers, key-value heads, entries, width)."""
