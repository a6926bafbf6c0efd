"""Gradient descent on per-sample tensors, with a gradient through the descent.

Nothing here is specific to language models: `descend` takes any function from per-sample tensors to per-sample losses,
so it also serves other kinds of test-time training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .compiled import Graphs, compiled_gradient
from .optimizers import Rates, Tensors, Update, clip

Order = Literal["none", "first", "second"]
Strategy = Literal["unroll", "recompute", "compile"]
Loss = Callable[..., Tensor]


@dataclass
class Step:
    """The state of a descent.

    Attributes
    ----------
    tensors : dict of Tensor, shapes (batch, ...)
        The tensors after the steps taken so far.
    losses : list of Tensor, shape (batch,)
        The loss before each step taken so far; part of the graph if gradients are enabled.
    taken : Tensor, int64, shape (batch,)
        Number of steps that each sample took; `until` may stop some samples earlier than others.
    """

    tensors: Tensors
    losses: list[Tensor]
    taken: Tensor


def descend(
    loss: Loss,
    tensors: Tensors,
    update: Update,
    rates: Callable[[int], Rates],
    steps: int,
    *,
    given: Sequence[Tensor] = (),
    order: Order = "second",
    last_k: int | None = None,
    strategy: Strategy = "unroll",
    graphs: Graphs | None = None,
    more: bool = False,
    clip_value: float | None = None,
    clip_norm: float | None = None,
    until: float | None = None,
) -> Iterator[Step]:
    """Descend `loss` and yield the state before the first step and after every step.

    Parameters
    ----------
    loss : callable
        `loss(tensors, *given)` returns losses of shape (batch,). They are summed, so the gradient of a sample does not
        depend on the other samples. It may use the parameters of modules; a computed tensor that needs a gradient
        must be in `given`.
    tensors : dict of Tensor, shapes (batch, ...)
        Starting point.
    update : callable
        An update of `gradmem.inner.optimizers`.
    rates : callable
        `rates(step)`, with steps counted from 0, returns the learning rate of each tensor, broadcast against it.
    steps : int
        Most steps.
    given : sequence of Tensor
        Further arguments of `loss`, the same at every step.
    order : {"none", "first", "second"}
        "second" differentiates through the gradients. "first" treats them as constants and keeps the identity path to
        the start. "none" detaches after every step.
    last_k : int, optional
        With "second": only the last k steps are of second order, the earlier ones of first order.
    strategy : {"unroll", "recompute", "compile"}
        "unroll" keeps the graph of every step. "recompute" keeps the graph of the last step and rebuilds the others,
        one at a time, in the backward pass, so memory does not grow with the number of steps. "compile" is "unroll"
        with compiled second-order steps. All give the same gradients.
    graphs : dict, optional
        The graphs that "compile" keeps from one descent of this loss to the next; see `compiled_gradient`.
    more : bool
        Whether other descents continue from the last state: "recompute" then keeps no graph.
    clip_value, clip_norm : float, optional
        Clip the gradient of each sample and tensor; see `gradmem.inner.optimizers.clip`.
    until : float, optional
        A sample whose loss is at most this takes no further step; see also `skip_finished`.
    """
    training, graphs = torch.is_grad_enabled(), {} if graphs is None else graphs
    if order == "none" or not training:
        tensors = {name: tensor.detach() for name, tensor in tensors.items()}
    batch = next(iter(tensors.values())).shape[0]
    device = next(iter(tensors.values())).device
    now = Step(tensors, [], torch.zeros(batch, dtype=torch.long, device=device))
    yield now
    state = None
    for index in range(steps):
        second = training and order == "second" and (last_k is None or index >= steps - last_k)
        if training and strategy == "recompute" and (more or index < steps - 1):
            losses, points, grads = _rebuilt_gradient(loss, now.tensors, given, second)
        elif second and strategy == "compile":
            points = {name: _differentiable(tensor) for name, tensor in now.tensors.items()}
            losses, grads = compiled_gradient(graphs, loss, points, given)
        else:
            losses, points, grads = _gradient(loss, now.tensors, given, second, training)
        active = None if until is None else losses.detach() > until
        if active is not None and not bool(active.any()):
            return
        clipped = {name: clip(grad, clip_value, clip_norm) for name, grad in zip(points, grads, strict=True)}
        updated, state = update(points if second else now.tensors, clipped, state, rates(index))
        if active is not None:
            updated = {name: torch.where(_like(active, new), new, now.tensors[name]) for name, new in updated.items()}
        if order == "none" or not training:
            updated = {name: tensor.detach() for name, tensor in updated.items()}
        taken = now.taken + (1 if active is None else active.long())
        now = Step(updated, [*now.losses, losses if training else losses.detach()], taken)
        yield now


def skip_finished(loss: Loss, until: float) -> Loss:
    """Wrap a loss for `descend` so that samples that have reached `until` are not computed again.

    Only for one descent without gradients. Everything in `loss` that depends on the sample must come through `given`,
    in shapes (batch, ...), because the remaining rows are selected from there.
    """
    known: Tensor | None = None

    def unfinished(tensors: Tensors, *given: Tensor) -> Tensor:
        nonlocal known
        if known is None or bool((known > until).all()):
            losses: Tensor = loss(tensors, *given)
        else:
            rows = (known > until).nonzero()[:, 0]
            some = loss({name: tensor[rows] for name, tensor in tensors.items()}, *(tensor[rows] for tensor in given))
            losses = known.index_copy(0, rows, some)
        known = losses.detach()
        return losses

    return unfinished


def _like(flags: Tensor, tensor: Tensor) -> Tensor:
    return flags.view(-1, *[1] * (tensor.dim() - 1))


def _gradient(
    loss: Loss, tensors: Tensors, given: Sequence[Tensor], second: bool, training: bool
) -> tuple[Tensor, Tensors, Sequence[Tensor]]:
    """Compute losses, the points where they were taken, and the gradient there; keep the graph."""
    with torch.enable_grad():
        points = {name: _differentiable(tensor) for name, tensor in tensors.items()}
        losses = loss(points, *given)
        grads = torch.autograd.grad(losses.sum(), list(points.values()), create_graph=second, retain_graph=training)
    return losses, points, grads


def _rebuilt_gradient(
    loss: Loss, tensors: Tensors, given: Sequence[Tensor], second: bool
) -> tuple[Tensor, Tensors, Sequence[Tensor]]:
    """Compute what `_gradient` does, but rebuild the graph in the backward pass instead of keeping it."""
    points = {name: _differentiable(tensor) for name, tensor in tensors.items()}
    inputs = [*points.values(), *given]

    def losses_at(inputs: Sequence[Tensor]) -> Tensor:
        return loss(dict(zip(points, inputs, strict=False)), *inputs[len(points) :])

    leaves = [_leaf(tensor) for tensor in inputs]
    losses = losses_at(leaves)
    parameters = [leaf for leaf in _leaves(losses) if not any(leaf is other for other in leaves)]
    grads = torch.autograd.grad(losses.sum(), leaves[: len(points)])
    rebuild = _Rebuild(losses_at, len(points), len(inputs), second, _autocast(losses.device))
    losses, *grads = _Rebuilt.apply(rebuild, (losses.detach(), *grads), *inputs, *parameters)
    return losses, points, grads


@dataclass(frozen=True)
class _Rebuild:
    """How to rebuild one step: `loss` of `inputs` tensors, differentiated by the first `points` of them."""

    loss: Callable[[Sequence[Tensor]], Tensor]
    points: int
    inputs: int
    second: bool
    autocast: Callable[[], torch.autocast]


class _Rebuilt(torch.autograd.Function):
    """Known losses and gradients, as a differentiable function of the tensors that they were computed from."""

    @staticmethod
    def forward(ctx: Any, rebuild: _Rebuild, results: tuple[Tensor, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.rebuild = rebuild
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        if not rebuild.second:
            ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        rebuild: _Rebuild = ctx.rebuild
        inputs, parameters = ctx.saved_tensors[: rebuild.inputs], ctx.saved_tensors[rebuild.inputs :]
        with torch.enable_grad(), rebuild.autocast():
            leaves = [_leaf(tensor) for tensor in inputs]
            results = [rebuild.loss(leaves)]
            if rebuild.second:
                points = leaves[: rebuild.points]
                results += torch.autograd.grad(results[0].sum(), points, create_graph=True)
        asked = [(r, c) for r, c in zip(results, cotangents, strict=False) if c is not None]
        sources = [*leaves, *parameters]
        wanted = [tensor for tensor in sources if tensor.requires_grad]
        found = iter(torch.autograd.grad([r for r, _ in asked], wanted, [c for _, c in asked], allow_unused=True))
        return None, None, *(next(found) if tensor.requires_grad else None for tensor in sources)


def _differentiable(tensor: Tensor) -> Tensor:
    """Return the tensor, or a new leaf if it is not part of a graph."""
    return tensor if tensor.requires_grad else tensor.detach().requires_grad_()


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _leaves(root: Tensor) -> list[Tensor]:
    """Find the leaves of a graph that need gradients."""
    found, seen, stack = [], set(), [root.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        stack.extend(parent for parent, _ in node.next_functions)
    return found


def _autocast(device: torch.device) -> Callable[[], torch.autocast]:
    """Capture the current autocast, to enter it again in a backward pass, which runs outside of it."""
    kind = device.type
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype, enabled)
