"""Inner optimizers: pure update functions that are differentiable with respect to all arguments.

An update maps (tensors, gradients, state, learning rates) to new tensors and a new state. It changes nothing in place,
so a meta-gradient can pass through any number of updates. The first dimension of every tensor is the batch; no sample
affects another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Rates = Mapping[str, float | Tensor]
Update = Callable[[Tensors, Tensors, Any, Rates], tuple[Tensors, Any]]


def clip(grad: Tensor, value: float | None, norm: float | None) -> Tensor:
    """Clip the gradient of each sample by value, then by norm.

    Parameters
    ----------
    grad : Tensor, shape (batch, ...)
    value : float or None
        Largest absolute value of an element.
    norm : float or None
        Largest 2-norm of a sample; a larger gradient becomes `grad * norm / (||grad|| + 1e-6)`.
    """
    if value is not None:
        grad = grad.clamp(-value, value)
    if norm is not None:
        size = torch.linalg.vector_norm(grad.flatten(1), dim=1).view(-1, *[1] * (grad.dim() - 1))
        grad = torch.where(size > norm, grad * (norm / (size + 1e-6)), grad)
    return grad


def sgd(tensors: Tensors, grads: Tensors, state: None, rates: Rates) -> tuple[Tensors, None]:
    """Take one step of gradient descent: M <- M - lr * g (paper, equation of the WRITE step)."""
    return {name: tensor - rates[name] * grads[name] for name, tensor in tensors.items()}, None


def heavy_ball(momentum: Callable[[int], float | Tensor]) -> Update:
    """Build an update with momentum: v <- g + momentum(k) * v, then M <- M - lr * v, at step k counted from 0."""

    def update(tensors: Tensors, grads: Tensors, state: Any, rates: Rates) -> tuple[Tensors, Any]:
        step, velocity = state or (0, None)
        if velocity is not None:
            grads = {name: grad + momentum(step) * velocity[name] for name, grad in grads.items()}
        return sgd(tensors, grads, None, rates)[0], (step + 1, grads)

    return update


ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 1e-8


def adam(tensors: Tensors, grads: Tensors, state: Any, rates: Rates) -> tuple[Tensors, Any]:
    """Take one step of Adam whose derivatives exist everywhere.

    The denominator is sqrt(v + eps^2) instead of sqrt(v) + eps. Both are equal to within eps, but the slope of sqrt(v)
    is infinite if a second moment is zero, and second order would give NaN.
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


def published_adam(tensors: Tensors, grads: Tensors, state: Any, rates: Rates) -> tuple[Tensors, Any]:
    """Take one step of Adam as the published code does: a constant for the meta-gradient.

    Gradients are clamped to 10, and those whose root mean square is under 1e-4 are damped.
    """
    beta1, beta2 = ADAM_BETAS
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    count, first, second = state or (0, zeros, zeros)
    count += 1
    clamped = {name: grads[name].detach().clamp(-10, 10) for name in tensors}
    first = {name: beta1 * first[name] + (1 - beta1) * grad for name, grad in clamped.items()}
    second = {name: beta2 * second[name] + (1 - beta2) * grad**2 for name, grad in clamped.items()}
    updated = {}
    for name, tensor in tensors.items():
        scale = (second[name] / (1 - beta2**count)).clamp_min(ADAM_EPS).sqrt() + ADAM_EPS
        updated[name] = tensor - rates[name] * (first[name] / (1 - beta1**count)) / scale
    return updated, (count, first, second)


OPTIMIZERS: dict[str, Update] = {"sgd": sgd, "adam": adam, "published_adam": published_adam}
