"""Gauss-Newton steps on per-sample tensors.

The loss is a convex function of outputs, which are a function of the tensors with Jacobian J. A step solves
(J' B J + damping) s = g, where B is the second derivative of the loss with respect to the outputs. J' B J is never
formed: conjugate gradients only need its products with vectors, each of which costs about two gradients (Martens, Deep
learning via Hessian-free optimization, ICML 2010). A meta-gradient treats the steps as constants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from .meta_gradient import Step
from .optimizers import Tensors

Outputs = Callable[[Tensors], Tensor]
Losses = Callable[[Tensor], Tensor]

ITERATIONS = 5
"""Iterations of conjugate gradients in a step. These three constants were chosen on key-value pairs."""
DAMPING = 0.1
"""Damping, as a fraction of the curvature along the gradient."""
STEP_FRACTION = 0.7
"""Fraction of the solution that a step takes; the whole solution overshoots."""


def gauss_newton(
    states: Iterable[Step], parts: Sequence[tuple[Outputs, Losses]], steps: int, until: float | None = None
) -> Iterator[Step]:
    """Yield the states of a descent, then continue from its last state with Gauss-Newton steps.

    Gradients treat these steps as constants and take the identity path to the descent.

    Parameters
    ----------
    states : iterable of Step
        The result of `descend`.
    parts : sequence of (callable, callable)
        Parts that sum to the loss of each sample: `outputs(tensors)` of any shape, and a convex `losses(outputs)` of
        shape (batch,). Each output may depend on the tensors of one sample only. With several parts, one graph is kept
        at a time, and each is rebuilt for every product.
    steps : int
        Most Gauss-Newton steps.
    until : float, optional
        A sample whose loss is at most this takes no further step.
    """
    for now in states:
        yield now
    for _ in range(steps):
        losses, solution = _solve(parts, now.tensors)
        active = torch.ones_like(losses, dtype=torch.bool) if until is None else losses > until
        if until is not None and not bool(active.any()):
            return
        moved = _flat(now.tensors) - STEP_FRACTION * active[:, None] * solution
        now = Step(_shaped(moved, now.tensors), [*now.losses, losses], now.taken + active.long())
        yield now


def _solve(parts: Sequence[tuple[Outputs, Losses]], tensors: Tensors) -> tuple[Tensor, Tensor]:
    """Compute losses (batch,), and solutions (batch, numbers) for all tensors of a sample, concatenated."""

    def graphs() -> Iterator[_Graph]:
        return (_Graph(*part, tensors) for part in parts)

    kept = list(graphs()) if len(parts) == 1 else None

    def total(of: Callable[[_Graph], Tensor]) -> Tensor:
        return torch.stack(list(map(of, kept or graphs()))).sum(0)

    start = total(lambda graph: torch.cat([graph.losses[:, None], graph.gradient()], 1))
    losses, gradient = start[:, 0], start[:, 1:]
    return losses, conjugate_gradients(lambda vector: total(lambda graph: graph.product(vector)), gradient)


class _Graph:
    """One part of the losses at a point, with products of its Gauss-Newton matrix and vectors (batch, numbers)."""

    def __init__(self, outputs: Outputs, losses: Losses, tensors: Tensors) -> None:
        with torch.enable_grad():
            self.point = _flat(tensors).detach().requires_grad_()
            self.outputs = outputs(_shaped(self.point, tensors))
            self.given = self.outputs.detach().requires_grad_()
            samples = losses(self.given)
            (self.slope,) = torch.autograd.grad(samples.sum(), self.given, create_graph=True)
            # J'u is linear in u and has J as its derivative: products J v without forward-mode formulas.
            self.dual = torch.zeros_like(self.outputs, requires_grad=True)
            (self.pulled,) = torch.autograd.grad(self.outputs, self.point, self.dual, create_graph=True)
        self.losses = samples.detach()

    def gradient(self) -> Tensor:
        return self._pull(self.slope.detach())

    def product(self, vector: Tensor) -> Tensor:
        """Compute J' B J v."""
        (pushed,) = torch.autograd.grad(self.pulled, self.dual, vector, retain_graph=True)
        (bent,) = torch.autograd.grad(self.slope, self.given, pushed, retain_graph=True)
        return self._pull(bent)

    def _pull(self, cotangent: Tensor) -> Tensor:
        (pulled,) = torch.autograd.grad(self.outputs, self.point, cotangent, retain_graph=True)
        return pulled


def conjugate_gradients(product: Callable[[Tensor], Tensor], target: Tensor) -> Tensor:
    """Solve (A + damping) x = target for each row (batch, numbers), starting from zero, with `product(x)` = A x.

    The damping is `DAMPING` times the curvature along the target. Rows whose target is zero stay zero.
    """
    found, rest, direction = torch.zeros_like(target), target, target
    size, damping = _dot(rest, rest), None
    for _ in range(ITERATIONS):
        image = product(direction)
        if damping is None:
            damping = DAMPING * _ratio(_dot(direction, image), size)
        image = image + damping * direction
        rate = _ratio(size, _dot(direction, image))
        found, rest = found + rate * direction, rest - rate * image
        before, size = size, _dot(rest, rest)
        direction = rest + _ratio(size, before) * direction
    return found


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum(1, keepdim=True)


def _ratio(one: Tensor, other: Tensor) -> Tensor:
    """Divide, with zero where the denominator is not positive."""
    return torch.where(other > 0, one / torch.where(other > 0, other, 1), 0)


def _flat(tensors: Tensors) -> Tensor:
    return torch.cat([tensor.flatten(1) for tensor in tensors.values()], 1)


def _shaped(flat: Tensor, like: Tensors) -> Tensors:
    pieces = flat.split([tensor[0].numel() for tensor in like.values()], 1)
    return {name: piece.view_as(tensor) for (name, tensor), piece in zip(like.items(), pieces, strict=True)}
