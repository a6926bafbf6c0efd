"""Compiled write steps: the gradients of the naive reference, from graphs that serve again."""

from __future__ import annotations

import os
import shutil
from typing import Any

import pytest
import torch

from gradmem.batch import Batch
from gradmem.inner.compiled import Graphs, compiled_gradient
from gradmem.methods import GradMem
from helpers import assert_same_gradients, distance, gradients, make_batch, make_gradmem, naive, outer_loss

TOLERANCE = {"gpt2": 1e-9, "llama": 1e-5}
"""Of float64, which Llama's own attention leaves for its softmax."""
compiles = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler here")

EVERYTHING = {
    "n_ctrl": 1,
    "projection": "per_sample",
    "write_head": "random",
    "learn_inner_lr": True,
    "learn_momentum": True,
    "write_steps": 3,
    "last_k": 2,
}


def compiled(kind: str = "gpt2", **options: Any) -> GradMem:
    # One block: compiling takes its time.
    method = make_gradmem(kind, config={"gpt2": {"n_layer": 1}, "llama": {"num_hidden_layers": 1}}[kind], **options)
    method.strategy = "compile"
    return method


def unrolled(method: GradMem, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the same weights without compiling."""
    method.strategy = "unroll"
    loss, _ = outer_loss(method, batch)
    grads = gradients(loss, method)
    method.strategy = "compile"
    return loss.item(), grads


@compiles
def test_equals_naive() -> None:
    """Loss, what is written, and all gradients."""
    method, batch, tolerance = compiled("llama", **EVERYTHING), make_batch(), TOLERANCE["llama"]
    loss, memory = outer_loss(method, batch, auxiliary=0.5)
    wanted_loss, wanted = naive(method, **EVERYTHING).loss(batch, auxiliary=0.5)
    assert loss.item() == pytest.approx(wanted_loss.item(), rel=tolerance)
    for row, tensors in enumerate(wanted):
        for key, tensor in tensors.items():
            assert distance(memory.tensors[key][row], tensor) < tolerance, (row, key)
    assert_same_gradients(gradients(loss, method), gradients(wanted_loss, method), tolerance)
    assert method.graphs


@compiles
def test_a_graph_serves_other_contexts_and_other_weights() -> None:
    """Nothing of the first call stays in it: neither texts, nor which chunk is whose, nor weights."""
    method = compiled(chunk_size=3, chunk_mode="joint", write_steps=1)
    lengths = ([7, 5, 8], [8, 7, 4])  # three, two and three chunks; three, three and two
    for seed, some in enumerate(lengths):
        batch = make_batch(seed)
        batch.context.mask[:] = torch.arange(8) < torch.tensor(some)[:, None]
        loss, _ = outer_loss(method, batch)
        wanted_loss, wanted = unrolled(method, batch)
        assert loss.item() == pytest.approx(wanted_loss, rel=TOLERANCE["gpt2"])
        assert_same_gradients(gradients(loss, method), wanted, TOLERANCE["gpt2"])
        with torch.no_grad():
            for parameter in method.parameters():
                parameter.mul_(1.1)
    assert len(method.graphs) == 1


@compiles
def test_only_what_stays_is_constant() -> None:
    """Not a tensor that is filled from the input, nor a drawn one."""

    def filled(points: dict[str, torch.Tensor], given: torch.Tensor) -> torch.Tensor:
        scale = torch.ones(3) * 2
        scale[1:] += given[0, 1:]
        return (points["memory"] * scale).square().sum(-1)

    def drawn(points: dict[str, torch.Tensor], given: torch.Tensor) -> torch.Tensor:
        return (points["memory"] * torch.rand(3) * torch.arange(3)).sum(-1)

    memory = torch.ones(1, 3, requires_grad=True)
    graphs: Graphs = {}
    for value in (3.0, 5.0):
        _, (grad,) = compiled_gradient(graphs, filled, {"memory": memory}, [torch.full((1, 3), value)])
        assert grad.tolist() == [[8.0, 2 * (2 + value) ** 2, 2 * (2 + value) ** 2]]
    graphs = {}
    first, second = (compiled_gradient(graphs, drawn, {"memory": memory}, [memory])[1][0] for _ in range(2))
    assert first[0, 0] == second[0, 0] == 0
    assert first[0, 1] != second[0, 1]
