"""GradMem against the naive reference, finite differences and full forward passes, in float64."""

from __future__ import annotations

import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gradmem.batch import Tokens
from gradmem.memory import Memory
from gradmem.methods import GradMem
from gradmem.training.plan import AUTO
from helpers import (
    KINDS,
    TOLERANCE,
    VOCABULARY,
    assert_same_gradients,
    check_slopes,
    distance,
    gradients,
    make_batch,
    make_gradmem,
    naive,
    outer_loss,
    random_tokens,
    real,
)
from naive import OPTIONS

DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.5)


def memory_of(method: GradMem, context: Tokens, **options: Any) -> Tensor:
    return method.write(context, **options).memory.tensors["memory"]


# --- The naive reference ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in OPTIONS])
def test_equals_naive(kind: str, name: str) -> None:
    """Loss, everything written, and all gradients, by every strategy."""
    options, batch = OPTIONS[name], make_batch()
    reference = make_gradmem(kind, **options)
    wanted_loss, wanted = naive(reference, **options).loss(batch, auxiliary=0.5)
    wanted_grads = gradients(wanted_loss, reference)
    for strategy in AUTO:
        method = make_gradmem(kind, **options)
        method.strategy = strategy
        loss, memory = outer_loss(method, batch, auxiliary=0.5)
        assert loss.item() == pytest.approx(wanted_loss.item(), rel=TOLERANCE), strategy
        assert len(memory) == len(wanted)
        assert memory.tensors.keys() == wanted[0].keys()
        for row, tensors in enumerate(wanted):
            for key, tensor in tensors.items():
                assert distance(memory.tensors[key][row], tensor) < TOLERANCE, (strategy, row, key)
        grads = gradients(loss, method)
        assert_same_gradients(grads, wanted_grads)
        if options.get("order") == "none" and options.get("write_steps") != 0:
            assert not grads["initial_memory"].any()
        else:
            assert grads["initial_memory"].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", ["second", "everything_last_k", "everything_adam", "everything_momentum"])
def test_strategies_agree(kind: str, dtype: torch.dtype, tolerance: float, name: str) -> None:
    """With each other and, in float32 too, with the reference in float64."""
    results = []
    for strategy in AUTO:
        method = make_gradmem(kind, **OPTIONS[name]).to(dtype)
        method.strategy = strategy
        loss, _ = outer_loss(method, make_batch(), auxiliary=0.5)
        results.append({"loss": loss, **gradients(loss, method)})
    exact = make_gradmem(kind, **OPTIONS[name]).to(dtype).double()
    loss, _ = naive(exact, **OPTIONS[name]).loss(make_batch(), auxiliary=0.5)
    reference = {"loss": loss, **gradients(loss, exact)}
    largest = max(tensor.norm() for tensor in reference.values())
    for key, wanted in reference.items():
        allowed = tolerance * max(wanted.norm(), 1e-3 * largest)
        assert (results[0][key] - results[1][key]).norm() <= allowed, key
        # Adam divides by small moments, which magnifies the rounding of float32, of the reference's as of ours.
        if dtype == torch.float64 or "adam" not in name:
            assert all((result[key] - wanted).norm() <= allowed for result in results), key


def test_recompute_keeps_one_step_whatever_their_number() -> None:
    """What the graph of WRITE holds on to grows by memories only, not by activations."""
    sizes = []
    for steps in (1, 2, 6):
        method, held = make_gradmem(), []

        def pack(tensor: Tensor, held: list[weakref.ref[Tensor]] = held) -> Tensor:
            alive = tensor.view_as(tensor)
            held.append(weakref.ref(alive))
            return alive

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            written = method.write(make_batch().context, steps)
        parameters = {parameter.shape for parameter in method.parameters()}
        alive = [ref() for ref in held]
        sizes.append(sum(t.numel() for t in alive if t is not None and t.shape not in parameters))
        memory = written.memory.tensors["memory"].numel()
    assert sizes[2] - sizes[1] < 20 * memory  # four steps
    assert sizes[0] > 100 * memory  # of which one is kept whole


@pytest.mark.parametrize("kind", KINDS)
def test_write_losses_equal_naive(kind: str) -> None:
    """Losses before every step, and of every token under the written memory."""
    method, context = make_gradmem(kind), make_batch().context
    written = method.write(context)
    tokens = method.token_losses(written.memory, context)
    assert not tokens[~context.mask].any()
    for row in range(len(context)):
        ids = real(context, row)
        tensors, losses = naive(method).write(ids)
        assert distance(written.losses[:, row], torch.stack(losses)) < TOLERANCE
        logits = naive(method).forward("write", tensors, ids)[:-1]
        wanted = F.cross_entropy(logits, ids, reduction="none")
        assert distance(tokens[row, : len(ids)], wanted) < TOLERANCE


def test_reconstruction_is_the_loss_that_one_more_step_would_begin_with() -> None:
    options = {"write_head": "random", "learn_inner_lr": True}
    batch, method = make_batch(), make_gradmem(reconstruction=True, **options)
    got = method.write_loss(method.write(batch.context), batch.context)
    wanted = method.write(batch.context, method.write_steps + 1).losses[-1].mean()
    assert distance(got, wanted) < 1e-12
    assert_same_gradients(gradients(got, method), gradients(wanted, method))
    plain = make_gradmem(**options)
    written = plain.write(batch.context)
    assert plain.write_loss(written, batch.context) == written.losses[-1].mean()


# --- Finite differences -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"write_head": "copy", "learn_inner_lr": True},
        {"projection": "proj", "n_ctrl": 1, "clip_norm": 0.1},
        {"projection": "per_sample", "clip_value": 0.05, "write_steps": 3},
        {"inner_optimizer": "adam", "inner_lr": 0.05, "learn_inner_lr": True, "write_head": "random"},
    ],
    ids=str,
)
def test_second_order_is_the_derivative(options: dict) -> None:
    """Of the whole of write, read and auxiliary loss, for every parameter."""
    method, batch = make_gradmem(**options), make_batch()
    check_slopes(method, lambda: outer_loss(method, batch, auxiliary=0.5)[0])


# --- Batches, steps, modes --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_neighbours_order_and_pads_change_nothing(kind: str, optimizer: str) -> None:
    method = make_gradmem(kind, inner_optimizer=optimizer, clip_norm=0.5)
    context = random_tokens([7, 4, 9, 1])
    together = memory_of(method, context)
    assert min(distance(together[i], together[j]) for i in range(4) for j in range(i)) > 1e-3
    shuffled = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(memory_of(method, context[shuffled]), together[shuffled], rtol=0, atol=1e-6)
    for row in range(4):
        ids = real(context, row)[None]
        alone = memory_of(method, Tokens(ids, torch.ones_like(ids, dtype=torch.bool)))
        assert distance(together[row], alone[0]) < TOLERANCE


@pytest.mark.parametrize("options", [{}, {"projection": "per_sample"}], ids=str)
def test_no_steps_leave_the_initial_memory(options: dict) -> None:
    method, context = make_gradmem(**options), make_batch().context
    written = method.write(context, 0)
    assert written.losses.shape == (0, 3)
    assert written.taken.tolist() == [0, 0, 0]
    for row in range(3):
        assert torch.equal(written.memory.tensors["memory"][row], method.initial_memory)
        if options:
            assert torch.equal(written.memory.tensors["proj_weight"][row], method.proj.weight)
            assert torch.equal(written.memory.tensors["proj_bias"][row], method.proj.bias)


@pytest.mark.parametrize("options", [{}, {"inner_optimizer": "adam"}, {"last_k": 1}], ids=str)
def test_the_number_of_steps_is_an_argument(options: dict) -> None:
    context = make_batch().context
    method = make_gradmem(write_steps=5, **options)
    states = list(method.trajectory(context, 3))
    assert len(states) == 4
    for steps, state in enumerate(states):
        assert state.taken.tolist() == [steps] * 3
        other = make_gradmem(write_steps=steps, **options).write(context)
        assert torch.equal(state.memory.tensors["memory"], other.memory.tensors["memory"])
        assert torch.equal(state.losses, other.losses)
    assert len(method.write(context).losses) == 5


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_steps_beyond_those_trained_get_smaller(decay: float) -> None:
    method, context = make_gradmem(write_steps=2, inner_lr=0.3, extra_step_decay=decay), make_batch().context
    states = [state.memory.tensors["memory"].detach() for state in method.trajectory(context, 5)]
    for step, (before, after) in enumerate(pairwise(states)):
        point = Memory({"memory": before.clone().requires_grad_()})
        loss = (method.token_losses(point, context).sum(1) / context.lengths).sum()
        (gradient,) = torch.autograd.grad(loss, point.tensors["memory"])
        rate = 0.3 / [1, 1, 1 + decay, 1 + 2 * decay, 1 + 3 * decay][step]
        assert distance(after, before - rate * gradient) < 1e-12


def test_momentum_beyond_the_trained_steps_is_that_of_the_last_and_falls() -> None:
    method = make_gradmem(write_steps=2, learn_inner_lr=True, learn_momentum=True, extra_step_decay=0.5)
    context = make_batch().context
    with torch.no_grad():
        method.momentum.copy_(torch.tensor([0.9, 0.6], dtype=torch.float64))
    states = [state.memory.tensors["memory"].detach() for state in method.trajectory(context, 4)]
    velocity = torch.zeros_like(states[0])
    for step, (before, after) in enumerate(pairwise(states)):
        point = Memory({"memory": before.clone().requires_grad_()})
        loss = (method.token_losses(point, context).sum(1) / context.lengths).sum()
        (gradient,) = torch.autograd.grad(loss, point.tensors["memory"])
        velocity = gradient + [0.9, 0.6, 0.6 / 1.5, 0.6 / 2][step] * velocity
        rate = method.log_inner_lr[min(step, 1)].exp().detach() / [1, 1, 1.5, 2][step]
        assert distance(after, before - rate * velocity) < 1e-12, step


def test_until_stops_samples_one_by_one() -> None:
    method, context = make_gradmem(write_steps=6), make_batch().context
    states = list(method.trajectory(context, 6))
    until = states[3].losses[2].median().item()
    written = method.write(context, 6, until=until)
    for row in range(3):
        losses = [*states[-1].losses[:, row].tolist(), float("-inf")]
        steps = next(k for k, loss in enumerate(losses) if loss <= until)
        assert written.taken[row] == steps
        wanted = states[steps].memory.tensors["memory"][row]
        assert distance(written.memory.tensors["memory"][row], wanted) < 1e-12
    assert len(set(written.taken.tolist())) > 1


@pytest.mark.parametrize("name", ["second", "first", "none", "adam", "everything", "adam_last_k"])
def test_writing_without_gradients_gives_the_same(name: str) -> None:
    method, context = make_gradmem(**OPTIONS[name]), make_batch().context
    written = method.write(context)
    with torch.no_grad():
        free = method.write(context)
    assert not free.losses.requires_grad
    assert distance(free.losses, written.losses) < 1e-13
    for name, tensor in written.memory.tensors.items():
        assert not free.memory.tensors[name].requires_grad
        assert distance(free.memory.tensors[name], tensor) < 1e-13
    assert all(parameter.grad is None for parameter in method.parameters())


def test_dropout_is_off_in_write_and_on_in_read() -> None:
    method, batch = make_gradmem(config=DROPOUT), make_batch()
    calm = method.write(batch.context).memory
    method.train()
    excited = method.write(batch.context).memory
    assert torch.equal(excited.tensors["memory"], calm.tensors["memory"])
    assert torch.equal(method.token_losses(calm, batch.context), method.eval().token_losses(calm, batch.context))
    method.train()
    first, second = (method.read(calm, batch.queries, batch.rows) for _ in range(2))
    assert distance(first, second) > 1e-3
    assert all(module.training for module in method.modules()), "writing must restore the mode"
    method.eval()
    method.write(batch.context)
    assert not any(module.training for module in method.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_write_is_causal(kind: str) -> None:
    """A token changes its own loss and later ones, never an earlier one."""
    method, context, changed = make_gradmem(kind), random_tokens([8, 8]), 4
    ids = context.ids.clone()
    ids[:, changed] = (ids[:, changed] + 1) % VOCABULARY
    with torch.no_grad():
        memory = method.write(context).memory
        before, after = (method.token_losses(memory, Tokens(i, context.mask)) for i in (context.ids, ids))
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert (before[:, changed:] != after[:, changed:]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_longest_context_fits(kind: str) -> None:
    method = make_gradmem(kind, n_ctrl=2)
    assert method.max_context == 40 - 3 - 4
    assert memory_of(method, random_tokens([method.max_context])).isfinite().all()
