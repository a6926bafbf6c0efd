"""Gauss-Newton steps on per-sample tensors.

The loss is a convex function of outputs, which are a function of the tensors with Jacobian J. A step solves
(J' B J + damping) s = g, where B is the second derivative of the loss with respect to the outputs. J' B J is never
formed: conjugate gradients only need its products with vectors, each of which costs about two gradients (Martens, Deep
learning via Hessian-free optimization, ICML 2010).

A meta-gradient passes through s by the implicit function theorem: at a constant s the residual g - (J' B J + damping) s
has some derivative, and that of s is (J' B J + damping)^-1 times it. So a cotangent of s takes one more solution, and
no graph of the iterations is kept (Rajeswaran et al., Meta-learning with implicit gradients, NeurIPS 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

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
    states: Iterable[Step],
    parts: Sequence[tuple[Outputs, Losses]],
    steps: int,
    until: float | None = None,
    second: bool = False,
) -> Iterator[Step]:
    """Yield the states of a descent, then continue from its last state with Gauss-Newton steps.

    Parameters
    ----------
    states : iterable of Step
        The result of `descend`.
    parts : sequence of (callable, callable)
        Parts that sum to the loss of each sample: `outputs(tensors)` of any shape, and a convex `losses(outputs)` of
        shape (batch,). Each output may depend on the tensors of one sample only. With several parts, one graph is kept
        at a time, and each is rebuilt for every product; with `second`, all are kept.
    steps : int
        Most Gauss-Newton steps.
    until : float, optional
        A sample whose loss is at most this takes no further step.
    second : bool
        Whether gradients pass through the solutions; `outputs` and `losses` must then be three times differentiable
        (the layer norm of PyTorch is not, see `gradmem.ops.patching`). If not, gradients treat the steps as constants
        and take the identity path to the descent.
    """
    for now in states:
        yield now
    for _ in range(steps):
        losses, solution = _solve(parts, now.tensors, second)
        active = torch.ones_like(losses, dtype=torch.bool) if until is None else losses > until
        if until is not None and not bool(active.any()):
            return
        moved = _flat(now.tensors) - STEP_FRACTION * active[:, None] * solution
        now = Step(_shaped(moved, now.tensors), [*now.losses, losses], now.taken + active.long())
        yield now


def _solve(parts: Sequence[tuple[Outputs, Losses]], tensors: Tensors, second: bool) -> tuple[Tensor, Tensor]:
    """Compute losses (batch,), and solutions (batch, numbers) for all tensors of a sample, concatenated."""

    def graphs() -> Iterator[_Graph]:
        return (_Graph(*part, tensors, second) for part in parts)

    kept = list(graphs()) if second or len(parts) == 1 else None

    def total(of: Callable[[_Graph], Tensor]) -> Tensor:
        return torch.stack(list(map(of, kept or graphs()))).sum(0)

    def product(vector: Tensor) -> Tensor:
        return total(lambda graph: graph.product(vector))

    start = total(lambda graph: torch.cat([graph.losses[:, None], graph.gradient()], 1))
    losses, gradient = start[:, 0], start[:, 1:]
    if not second:
        return losses, conjugate_gradients(product, gradient)
    damping = _damping(gradient, total(lambda graph: graph.product(gradient, second)))
    solution = conjugate_gradients(product, gradient.detach(), damping.detach())
    residual = gradient - total(lambda graph: graph.product(solution, second)) - damping * solution
    return losses, _Implicit.apply(residual, solution, product, damping.detach())


class _Implicit(torch.autograd.Function):
    """A solution, as a function of its residual."""

    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, solution: Tensor, product: Callable[[Tensor], Tensor], damping: Tensor
    ) -> Tensor:
        ctx.product, ctx.damping = product, damping
        return solution.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        return conjugate_gradients(ctx.product, cotangents[0], ctx.damping), None, None, None


class _Graph:
    """One part of the losses at a point, with products of its Gauss-Newton matrix and vectors (batch, numbers).

    With `second`, losses, gradient and the products that are asked for so are part of the graph.
    """

    def __init__(self, outputs: Outputs, losses: Losses, tensors: Tensors, second: bool) -> None:
        with torch.enable_grad():
            flat = _flat(tensors)
            self.point = flat if second and flat.requires_grad else flat.detach().requires_grad_()
            self.outputs = outputs(_shaped(self.point, tensors))
            samples = losses(self.outputs)
            (self.slope,) = torch.autograd.grad(samples.sum(), self.outputs, create_graph=True)
            # J'u is linear in u and has J as its derivative: products J v without forward-mode formulas.
            self.dual = torch.zeros_like(self.outputs, requires_grad=True)
            (self.pulled,) = torch.autograd.grad(self.outputs, self.point, self.dual, create_graph=True)
        self.losses, self.second = samples if second else samples.detach(), second

    def gradient(self) -> Tensor:
        return self._pull(self.slope, self.second)

    def product(self, vector: Tensor, second: bool = False) -> Tensor:
        """Compute J' B J v."""
        (pushed,) = torch.autograd.grad(self.pulled, self.dual, vector, retain_graph=True, create_graph=second)
        (bent,) = torch.autograd.grad(self.slope, self.outputs, pushed, retain_graph=True, create_graph=second)
        return self._pull(bent, second)

    def _pull(self, cotangent: Tensor, second: bool) -> Tensor:
        (pulled,) = torch.autograd.grad(self.outputs, self.point, cotangent, retain_graph=True, create_graph=second)
        return pulled


def conjugate_gradients(product: Callable[[Tensor], Tensor], target: Tensor, damping: Tensor | None = None) -> Tensor:
    """Solve (A + damping) x = target for each row (batch, numbers), starting from zero, with `product(x)` = A x.

    By default the damping is `DAMPING` times the curvature along the target. Rows whose target is zero stay zero.
    """
    found, rest, direction = torch.zeros_like(target), target, target
    size = _dot(rest, rest)
    for _ in range(ITERATIONS):
        image = product(direction)
        if damping is None:
            damping = _damping(direction, image)
        image = image + damping * direction
        rate = _ratio(size, _dot(direction, image))
        found, rest = found + rate * direction, rest - rate * image
        before, size = size, _dot(rest, rest)
        direction = rest + _ratio(size, before) * direction
    return found


def _damping(gradient: Tensor, image: Tensor) -> Tensor:
    """Compute `DAMPING` times the curvature along a gradient, given its product with A."""
    return DAMPING * _ratio(_dot(gradient, image), _dot(gradient, gradient))


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
