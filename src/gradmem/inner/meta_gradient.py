"""Gradient descent on per-sample tensors, with a gradient through the descent.

Knows nothing of language models: `descend` takes any function from per-sample tensors to per-sample losses, so it
serves other kinds of test-time training as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .optimizers import Rates, Tensors, Update, clip

Order = Literal["none", "first", "second"]


@dataclass
class Step:
    """Where a descent stands.

    Attributes
    ----------
    tensors : dict of Tensor, shapes (batch, ...)
        The tensors after the steps taken so far.
    losses : list of Tensor, shape (batch,)
        The loss before each step taken so far, connected to the graph unless the order is "none" without gradients.
    taken : Tensor, int64, shape (batch,)
        Steps that each sample took (fewer than the others where `until` stopped it).
    """

    tensors: Tensors
    losses: list[Tensor]
    taken: Tensor


def descend(
    loss: Callable[[Tensors], Tensor],
    tensors: Tensors,
    update: Update,
    rates: Rates,
    steps: int,
    *,
    order: Order = "second",
    last_k: int | None = None,
    clip_value: float | None = None,
    clip_norm: float | None = None,
    until: float | None = None,
) -> Iterator[Step]:
    """Descend `loss` and yield the state before the first step and after every step.

    Parameters
    ----------
    loss : callable
        Maps the tensors to losses of shape (batch,). The losses are summed, so that the gradient of a sample does
        not depend on its neighbours.
    tensors : dict of Tensor, shapes (batch, ...)
        Starting point.
    update : callable
        One of `gradmem.inner.optimizers`.
    rates : mapping of float or Tensor
        Learning rate of each tensor, broadcast against it.
    steps : int
        Steps to take at most.
    order : {"none", "first", "second"}
        "second" differentiates through the gradients; "first" takes them as constants and keeps the identity path
        to the start; "none" detaches after every step.
    last_k : int, optional
        With "second", only the last k steps are of second order and the earlier ones of first.
    until : float, optional
        A sample whose loss is at most this takes no further step.
    """
    training = torch.is_grad_enabled()
    if order == "none" or not training:
        tensors = {name: tensor.detach() for name, tensor in tensors.items()}
    batch = next(iter(tensors.values())).shape[0]
    device = next(iter(tensors.values())).device
    now = Step(tensors, [], torch.zeros(batch, dtype=torch.long, device=device))
    yield now
    state = None
    for index in range(steps):
        second = training and order == "second" and (last_k is None or index >= steps - last_k)
        with torch.enable_grad():
            # A fresh leaf where the tensors carry no graph; second order must differentiate through the ones given.
            points = {
                name: tensor if tensor.requires_grad else tensor.detach().requires_grad_()
                for name, tensor in now.tensors.items()
            }
            losses = loss(points)
            grads = torch.autograd.grad(losses.sum(), list(points.values()), create_graph=second, retain_graph=training)
        active = None if until is None else losses.detach() > until
        if active is not None and not bool(active.any()):
            return
        clipped = {name: clip(grad, clip_value, clip_norm) for name, grad in zip(points, grads, strict=True)}
        updated, state = update(now.tensors if not second else points, clipped, state, rates)
        if active is not None:
            updated = {name: torch.where(_like(active, new), new, now.tensors[name]) for name, new in updated.items()}
        if order == "none" or not training:
            updated = {name: tensor.detach() for name, tensor in updated.items()}
        taken = now.taken + (1 if active is None else active.long())
        now = Step(updated, [*now.losses, losses if training else losses.detach()], taken)
        yield now


def _like(flags: Tensor, tensor: Tensor) -> Tensor:
    return flags.view(-1, *[1] * (tensor.dim() - 1))
