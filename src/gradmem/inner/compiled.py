"""Compile second-order write steps with TorchInductor.

A loss and its gradient are traced into one graph of plain operations. PyTorch compiles this graph together with its
backward pass, which takes a few hundred passes over memory instead of the thousands of eager PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg
from torch.nn import Parameter

from ..errors import GradmemError
from .optimizers import Tensors

Graphs = dict[Any, Callable[..., Sequence[Tensor]]]
"""Compiled graphs by the shapes and types of their inputs."""


def compiled_gradient(
    graphs: Graphs, loss: Callable[..., Tensor], points: Tensors, given: Sequence[Tensor]
) -> tuple[Tensor, Sequence[Tensor]]:
    """Compute losses and their gradient with respect to the points, both differentiable.

    Parameters
    ----------
    graphs : dict
        The graphs of this loss, to which new ones are added. What the loss reads besides its arguments must not change
        after tracing, except weights, which may change in place.
    loss : callable
        `loss(points, *given)` returns losses of shape (batch,). Its control flow must not depend on values.
    points : dict of Tensor, shapes (batch, ...)
        The tensors with respect to which the gradient is taken.
    given : sequence of Tensor

    Raises
    ------
    GradmemError
        If this machine cannot compile.
    """
    # Other strides would need another graph: the first point is an expanded M0.
    inputs = [tensor.contiguous() for tensor in (*points.values(), *given)]
    kind = inputs[0].device.type
    low = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
    key = (*points, low, *((tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad) for tensor in inputs))
    if key not in graphs:

        def losses_and_gradient(*inputs: Tensor) -> tuple[Tensor, ...]:
            at = inputs[: len(points)]
            # Weights in the cache of autocast would become constants of the graph.
            with torch.autocast(*low, cache_enabled=False):
                losses = loss(dict(zip(points, at, strict=True)), *inputs[len(points) :])
            return losses, *torch.autograd.grad(losses.sum(), at, create_graph=True)

        # On a GPU, gradients are computed in other threads, which tracing may not see.
        with torch.autograd.set_multithreading_enabled(False):
            traced = make_fx(losses_and_gradient, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
        graphs[key] = torch.compile(_fold_constants(_drop_detach(traced)), dynamic=False, fullgraph=True)
    try:
        with torch.autocast(kind, enabled=False):  # whose conversions are in the graph
            losses, *grads = graphs[key](*inputs)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        reason = str(error).splitlines()[0]
        raise GradmemError(f"cannot compile on this machine ({reason}): set `strategy: unroll`") from error
    return losses, grads


def _drop_detach(traced: GraphModule) -> GraphModule:
    """Remove `detach` from a graph: autograd adds it to results that it saves, and gradients must pass through."""
    for node in list(traced.graph.nodes):
        if node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
    traced.recompile()
    return traced


def _fold_constants(traced: GraphModule) -> GraphModule:
    """Replace everything in a graph that depends on no input and no weight by constants.

    Otherwise TorchInductor recomputes masks and rotary angles for every element of every pass that reads them.
    """
    values: dict[Node, Any] = {}
    for node in traced.graph.nodes:
        if node.op == "get_attr" and not isinstance(getattr(traced, node.target), Parameter):
            values[node] = getattr(traced, node.target)
        elif node.op == "call_function" and values.keys() >= set(node.all_input_nodes) and not _is_random(node):
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
        elif _writes(node) and node.args[0] in values:
            return traced  # a constant is overwritten
    for number, node in enumerate(values):
        if node.op == "call_function" and not values.keys() >= set(node.users):
            traced.register_buffer(f"constant{number}", values[node])
            with traced.graph.inserting_before(node):
                node.replace_all_uses_with(traced.graph.get_attr(f"constant{number}"))
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return traced


def _is_random(node: Node) -> bool:
    """Whether an operation draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _writes(node: Node) -> bool:
    """Whether an operation changes its first argument in place."""
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))
