"""Inner optimisers: pure update functions, differentiable in everything they take.

An update maps (tensors, gradients, state, learning rates) to new tensors and a new state and changes nothing in
place, so that a meta-gradient can pass through any number of them. The first dimension of every tensor is the
batch; samples never mix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Rates = Mapping[str, float | Tensor]
Update = Callable[[Tensors, Tensors, Any, Rates], tuple[Tensors, Any]]


def clip(grad: Tensor, value: float | None, norm: float | None) -> Tensor:
    """Clip by value, then by norm, each sample on its own.

    Parameters
    ----------
    grad : Tensor, shape (batch, ...)
    value : float or None
        Largest absolute value of an element.
    norm : float or None
        Largest 2-norm of a sample; beyond it `grad * norm / (||grad|| + 1e-6)`.
    """
    if value is not None:
        grad = grad.clamp(-value, value)
    if norm is not None:
        size = torch.linalg.vector_norm(grad.flatten(1), dim=1).view(-1, *[1] * (grad.dim() - 1))
        grad = torch.where(size > norm, grad * (norm / (size + 1e-6)), grad)
    return grad


def sgd(tensors: Tensors, grads: Tensors, state: None, rates: Rates) -> tuple[Tensors, None]:
    """M <- M - lr * g (paper, equation of the WRITE step)."""
    return {name: tensor - rates[name] * grads[name] for name, tensor in tensors.items()}, None


def heavy_ball(momentum: Callable[[int], float | Tensor]) -> Update:
    """Polyak's method: v <- g + momentum(k) * v, then M <- M - lr * v, at step k counted from 0."""

    def update(tensors: Tensors, grads: Tensors, state: Any, rates: Rates) -> tuple[Tensors, Any]:
        step, velocity = state or (0, None)
        if velocity is not None:
            grads = {name: grad + momentum(step) * velocity[name] for name, grad in grads.items()}
        return sgd(tensors, grads, None, rates)[0], (step + 1, grads)

    return update


SECANTS = 2
"""Pairs that `quasi_newton` remembers; three were no better (docs/results.md)."""
TRUST = 0.1
"""Longest step of `quasi_newton`, as a part of the way from the start."""
CURVED = 1e-3
"""Least cosine between a step and its change of the gradient that counts as positive curvature."""


def quasi_newton(first: Update, steps: int) -> Update:
    """`first` for some steps, then limited-memory BFGS, which learns the curvature from the gradients of all steps.

    It takes one gradient a step, as plain descent does. The inverse Hessian is that of the learning rates, corrected
    by the last `SECANTS` pairs of steps and changes of the gradient (Nocedal and Wright, Numerical Optimization,
    algorithm 7.4; each sample on its own, all its tensors together). Pairs without positive curvature are left out.
    Once there are steps behind it, a step goes at most `TRUST` times as far as the sample has come from its start.

    Parameters
    ----------
    first : Update
    steps : int
        For how many steps `first` is taken.
    """

    def update(tensors: Tensors, grads: Tensors, state: Any, rates: Rates) -> tuple[Tensors, Any]:
        step, inner, start, points, slopes = state or (0, None, tensors, [], [])
        points, slopes = [*points, tensors][-SECANTS - 1 :], [*slopes, grads][-SECANTS - 1 :]
        if step < steps:
            updated, inner = first(tensors, grads, inner, rates)
        else:
            pairs = list(zip(_differences(points), _differences(slopes), strict=True))
            descent = _bfgs_direction(grads, pairs, rates)
            if pairs:
                far, length = (_product(x, x).sqrt() for x in (_minus(tensors, start), descent))
                descent = _times((TRUST * far / length.clamp(min=1e-12)).clamp(max=1), descent)
            updated = _minus(tensors, descent)
        return updated, (step + 1, inner, start, points, slopes)

    return update


def _bfgs_direction(grads: Tensors, pairs: list[tuple[Tensors, Tensors]], rates: Rates) -> Tensors:
    """The gradient times the inverse Hessian that (step, change of gradient) pairs tell of, the oldest first."""
    curvatures = []
    for moved, turned in pairs:
        curvature = _product(moved, turned)
        sizes = (_product(moved, moved) * _product(turned, turned)).sqrt()
        curved = curvature > CURVED * sizes
        curvatures.append(torch.where(curved, 1 / torch.where(curved, curvature, 1), 0))
    direction, shares = grads, []
    for (moved, turned), inverse in zip(reversed(pairs), reversed(curvatures), strict=True):
        shares.append(inverse * _product(moved, direction))
        direction = _minus(direction, _times(shares[-1], turned))
    direction = {name: rates[name] * tensor for name, tensor in direction.items()}
    for (moved, turned), inverse, share in zip(pairs, curvatures, reversed(shares), strict=True):
        direction = _minus(direction, _times(inverse * _product(turned, direction) - share, moved))
    return direction


def _differences(points: list[Tensors]) -> list[Tensors]:
    return [_minus(after, before) for before, after in pairwise(points)]


def _minus(one: Tensors, other: Tensors) -> Tensors:
    return {name: tensor - other[name] for name, tensor in one.items()}


def _times(factors: Tensor, tensors: Tensors) -> Tensors:
    """Each sample's tensors times its own factor, shape (batch,)."""
    return {name: factors.view(-1, *[1] * (tensor.dim() - 1)) * tensor for name, tensor in tensors.items()}


def _product(one: Tensors, other: Tensors) -> Tensor:
    """Inner product of each sample, over all tensors, shape (batch,)."""
    return torch.stack([(tensor * other[name]).flatten(1).sum(1) for name, tensor in one.items()]).sum(0)


ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 1e-8


def adam(tensors: Tensors, grads: Tensors, state: Any, rates: Rates) -> tuple[Tensors, Any]:
    """One Adam step whose derivatives exist everywhere.

    The denominator is sqrt(v + eps^2) instead of sqrt(v) + eps: equal to within eps, but differentiable where a
    second moment is zero, where the square root alone has an infinite slope and second order gives NaN.
    """
    beta1, beta2 = ADAM_BETAS
    count, first, second = state or (
        0,
        {name: torch.zeros_like(tensor) for name, tensor in tensors.items()},
        {name: torch.zeros_like(tensor) for name, tensor in tensors.items()},
    )
    count += 1
    first = {name: beta1 * m + (1 - beta1) * grads[name] for name, m in first.items()}
    second = {name: beta2 * v + (1 - beta2) * grads[name] ** 2 for name, v in second.items()}
    updated = {}
    for name, tensor in tensors.items():
        mean = first[name] / (1 - beta1**count)
        scale = (second[name] / (1 - beta2**count) + ADAM_EPS**2).sqrt()
        updated[name] = tensor - rates[name] * mean / scale
    return updated, (count, first, second)


OPTIMIZERS: dict[str, Update] = {"sgd": sgd, "adam": adam}
