"""Gauss-Newton steps on per-sample tensors: descent that knows how the tensors move the outputs.

Where a loss is a convex function of outputs, and these a function of the tensors with the Jacobian J, the step
solves (J' B J + damping) s = g, B being the loss's second derivative by the outputs. J' B J is never formed: a few
conjugate gradients need its products with vectors, each of which costs about two gradients (Martens, Deep learning
via Hessian-free optimization, ICML 2010). A meta-gradient takes the steps as constants.
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
"""Conjugate gradients of a step; these three constants were chosen on key-value pairs (docs/results.md)."""
DAMPING = 0.1
"""Added to the curvature, as a part of that along the gradient."""
STEP_FRACTION = 0.7
"""Of the solution that a step goes; the whole of it overshoots."""


def gauss_newton(
    walk: Iterable[Step], parts: Sequence[tuple[Outputs, Losses]], steps: int, until: float | None = None
) -> Iterator[Step]:
    """Yield the states of a descent, then go on from its last one by Gauss-Newton steps.

    These are constants to gradients, which take the identity path to the descent.

    Parameters
    ----------
    walk : iterable of Step
        As `descend` yields them.
    parts : sequence of (callable, callable)
        What adds up to the loss of each sample, as `outputs(tensors)` of any shape and `losses(outputs)` of shape
        (batch,), the latter convex. Outputs may depend on the tensors of several samples, but each only on those of
        one. With several parts only one's graph is kept at a time, and built anew for every product.
    steps : int
        Gauss-Newton steps at most.
    until : float, optional
        A sample whose loss is at most this takes no further step.
    """
    for now in walk:
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
    """Losses (batch,), and the solutions (batch, numbers) for all of a sample's tensors in a row."""

    def graphs() -> Iterator[_Graph]:
        return (_Graph(*part, tensors) for part in parts)

    kept = list(graphs()) if len(parts) == 1 else None

    def total(of: Callable[[_Graph], Tensor]) -> Tensor:
        return torch.stack(list(map(of, kept or graphs()))).sum(0)

    start = total(lambda graph: torch.cat([graph.losses[:, None], graph.gradient()], 1))
    losses, gradient = start[:, 0], start[:, 1:]
    return losses, conjugate_gradients(lambda vector: total(lambda graph: graph.product(vector)), gradient)


class _Graph:
    """One part of the losses at a point, ready to multiply its Gauss-Newton matrix with vectors (batch, numbers)."""

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
        """J' B J v."""
        (pushed,) = torch.autograd.grad(self.pulled, self.dual, vector, retain_graph=True)
        (bent,) = torch.autograd.grad(self.slope, self.given, pushed, retain_graph=True)
        return self._pull(bent)

    def _pull(self, cotangent: Tensor) -> Tensor:
        (pulled,) = torch.autograd.grad(self.outputs, self.point, cotangent, retain_graph=True)
        return pulled


def conjugate_gradients(product: Callable[[Tensor], Tensor], target: Tensor) -> Tensor:
    """Solve (A + damping) x = target for each row (batch, numbers), starting from zero, `product` being A's.

    The damping is `DAMPING` times the curvature along the target. Rows without a target stay zero.
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
    """Their quotient, and zero where there is nothing to divide by."""
    return torch.where(other > 0, one / torch.where(other > 0, other, 1), 0)


def _flat(tensors: Tensors) -> Tensor:
    return torch.cat([tensor.flatten(1) for tensor in tensors.values()], 1)


def _shaped(flat: Tensor, like: Tensors) -> Tensors:
    pieces = flat.split([tensor[0].numel() for tensor in like.values()], 1)
    return {name: piece.view_as(tensor) for (name, tensor), piece in zip(like.items(), pieces, strict=True)}
