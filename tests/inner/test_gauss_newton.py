"""Gauss-Newton write steps against whole matrices and their Krylov spaces, in float64."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gradmem
from gradmem.backbone import Backbone
from gradmem.batch import Tokens
from gradmem.cli.evaluation_tables import results_table
from gradmem.errors import GradmemError
from gradmem.evaluation.measurement import evaluate
from gradmem.inner import descend, gauss_newton
from gradmem.inner.gauss_newton import DAMPING, ITERATIONS, STEP_FRACTION, conjugate_gradients
from gradmem.memory import Memory
from gradmem.methods import GradMem
from gradmem.model import MemoryModel
from gradmem.store import content_hash
from helpers import (
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

CHUNK = 3
TEXT = "a7:Qz\nk2:9f"
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "controls": {"n_ctrl": 2, "write_head": "random"},
    "projection of its own": {"projection": "per_sample"},
    "joint chunks": {"chunk_size": CHUNK, "chunk_mode": "joint"},
}


def dense_step(outputs: Tensor, jacobian: Tensor, targets: Tensor) -> Tensor:
    """The step for logits (tokens, V) with their Jacobian (tokens, V, numbers), best among gradients and their images.

    So many conjugate gradients give the minimum of the quadratic over the Krylov space of as many dimensions.
    """
    chances = outputs.softmax(1)
    bends = torch.diag_embed(chances) - chances[:, :, None] * chances[:, None]
    curvature = torch.einsum("tvi,tvw,twj->ij", jacobian, bends, jacobian) / len(outputs)
    gradient = torch.einsum("tvi,tv->i", jacobian, chances - F.one_hot(targets, outputs.shape[1])) / len(outputs)
    damping = DAMPING * (gradient @ curvature @ gradient) / (gradient @ gradient)
    damped = curvature + damping * torch.eye(len(gradient))
    basis = [gradient / gradient.norm()]
    for _ in range(ITERATIONS - 1):
        image = damped @ basis[-1]
        for _ in range(2):
            for vector in basis:
                image = image - (image @ vector) * vector
        basis.append(image / image.norm())
    space = torch.stack(basis, 1)
    return STEP_FRACTION * space @ torch.linalg.solve(space.T @ damped @ space, space.T @ gradient)


def logits_of(method: GradMem, context: Tensor, options: dict[str, Any], written: dict[str, Tensor]) -> Tensor:
    """The logits that count for the write loss of one context, as the naive reference computes them."""
    own = {name: value for name, value in options.items() if not name.startswith("chunk")}
    reference = naive(method, **own)
    chunks = context.split(CHUNK if "chunk_size" in options else len(context))
    return torch.cat([reference.forward("write", written, chunk)[:-1] for chunk in chunks])


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("name", OPTIONS)
def test_steps_are_those_of_whole_matrices(name: str, kind: str) -> None:
    options = OPTIONS[name]
    method, context = make_gradmem(kind, gauss_newton_after=1, **options), random_tokens([7, 5])
    plain = make_gradmem(kind, **options)
    with torch.no_grad():
        states = list(method.trajectory(context, 3))
        for got, wanted in zip(states, plain.trajectory(context, 1), strict=False):
            assert distance(got.memory.tensors["memory"], wanted.memory.tensors["memory"]) < 1e-12
    for before, after in pairwise(states[1:]):
        for row in range(2):
            start = {name: tensor[row] for name, tensor in before.memory.tensors.items()}
            ids = real(context, row)

            def outputs(flat: Tensor, start: dict[str, Tensor] = start, ids: Tensor = ids) -> Tensor:
                pieces = flat.split([tensor.numel() for tensor in start.values()])
                written = {n: piece.view_as(start[n]) for n, piece in zip(start, pieces, strict=True)}
                return logits_of(method, ids, options, written)

            point = torch.cat([tensor.flatten() for tensor in start.values()])
            jacobian = torch.autograd.functional.jacobian(outputs, point)
            logits = outputs(point).detach()
            got = torch.cat([tensor[row].flatten() for tensor in after.memory.tensors.values()])
            assert distance(point - got, dense_step(logits, jacobian, ids)) < 1e-7
            loss = F.cross_entropy(logits, ids)
            assert float(after.losses[len(before.losses), row]) == pytest.approx(float(loss), rel=1e-10)


@pytest.mark.parametrize("name", ["plain", "joint chunks"])
def test_parts_of_a_context_or_of_contexts_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, context, sizes = make_gradmem(gauss_newton_after=0, **OPTIONS[name]), random_tokens([8, 5, 7]), []
    with torch.no_grad():
        wanted = method.write(context, 2)
        before = method._hidden
        method._hidden = lambda tensors, embeds: (sizes.append(len(embeds)), before(tensors, embeds))[1]
        monkeypatch.setattr(Backbone, "tokens_at_once", 2 * (CHUNK if "chunk_size" in OPTIONS[name] else 8))
        got = method.write(context, 2)
    assert set(sizes) == ({2} if "chunk_size" in OPTIONS[name] else {1, 2})
    assert distance(got.losses, wanted.losses) < 1e-12
    assert distance(got.memory.tensors["memory"], wanted.memory.tensors["memory"]) < 1e-9


def test_five_steps_store_more_than_five_of_descent() -> None:
    context, method = random_tokens([12, 9]), make_gradmem(extra_step_decay=0.0)
    with torch.no_grad():
        plain = method.token_losses(method.write(context, 5).memory, context).sum(1)
        method.gauss_newton_after = 1
        curved = method.token_losses(method.write(context, 5).memory, context).sum(1)
    assert bool((curved < plain).all())


def test_until_stops_samples_one_by_one() -> None:
    """In the descent and after it, each as if it were alone."""
    method, context = make_gradmem(gauss_newton_after=1), random_tokens([4, 12, 9, 2])
    with torch.no_grad():
        losses = method.write(context, 6).losses
        until = float(losses[2].median())
        written = method.write(context, 5, until=until)
        for row in range(4):
            taken = int((losses[:5, row] > until).long().cumprod(0).sum())
            assert written.taken[row] == taken
            alone = method.write(Tokens.from_lists([real(context, row).tolist()]), taken)
            assert distance(written.memory[row].tensors["memory"], alone.memory.tensors["memory"]) < 1e-9
        assert len(set(written.taken.tolist())) > 1


SECOND: dict[str, tuple[str, int, dict[str, Any]]] = {
    "one step": ("gpt2", 1, {"gauss_newton_after": 0}),
    "a plain one before it": ("llama", 2, {"gauss_newton_after": 1, "learn_inner_lr": True}),
    "two steps": ("llama", 2, {"gauss_newton_after": 0}),
    "joint chunks": ("llama", 1, {"gauss_newton_after": 0, **OPTIONS["joint chunks"]}),
}
KINDS = ("memory", "lr", "wte.weight", "embed_tokens.weight", "0.ln_1.weight", "attn.c_attn.weight",
         "0.mlp.c_fc.weight", "q_proj.weight", "gate_proj.weight", "layernorm.weight", "lm_head.weight")  # fmt: skip
"""Endings of the names of the parameters to try: one of each kind."""


@pytest.mark.parametrize("name", SECOND)
def test_the_meta_gradient_is_that_of_finite_differences(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of reading and of the loss before the last step, where conjugate gradients are taken to the exact solution."""
    kind, steps, options = SECOND[name]
    method, batch = make_gradmem(kind, n_mem=1, write_steps=steps, **options), make_batch(1)
    iterations = method.initial_memory.numel() + 4
    monkeypatch.setattr(sys.modules[conjugate_gradients.__module__], "ITERATIONS", iterations)
    names = {name for name, _ in method.named_parameters() if name.endswith(KINDS)}
    assert len(names) > 5
    check_slopes(method, lambda: outer_loss(method, batch, 0.5)[0], names)


@pytest.mark.parametrize("name", ["plain", "joint chunks"])
def test_parts_have_the_same_meta_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, batch = make_gradmem("llama", gauss_newton_after=0, write_steps=1, **OPTIONS[name]), make_batch()
    wanted = gradients(outer_loss(method, batch, 0.5)[0], method)
    monkeypatch.setattr(Backbone, "tokens_at_once", CHUNK if "chunk_size" in OPTIONS[name] else 8)
    assert_same_gradients(gradients(outer_loss(method, batch, 0.5)[0], method), wanted)


def test_a_large_vocabulary_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    method, batch = make_gradmem(gauss_newton_after=0, write_steps=1), make_batch()
    monkeypatch.setattr("gradmem.ops.cross_entropy.CHUNK", 64)
    with pytest.raises(GradmemError, match=r"method\.order: first"):
        gradients(outer_loss(method, batch)[0], method)


@pytest.mark.parametrize("options", [{}, {"projection": "per_sample", "learn_inner_lr": True}], ids=str)
def test_first_order_takes_them_as_constants(options: dict[str, Any]) -> None:
    method, batch = make_gradmem(gauss_newton_after=1, write_steps=3, order="first", **options), make_batch()

    def read_loss(memory: Memory) -> Tensor:
        logits = method.read(memory, batch.queries, batch.rows)[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())

    got = gradients(read_loss(method.write(batch.context).memory), method)
    before, after = (method.write(batch.context, steps).memory.tensors for steps in (1, 3))
    moves = {name: (after[name] - before[name]).detach() for name in before}
    method.gauss_newton_after = None
    moved = Memory({name: tensor + moves[name] for name, tensor in before.items()})
    assert_same_gradients(got, gradients(read_loss(moved), method))


def test_a_sample_without_slope_rests() -> None:
    start = {"x": torch.tensor([[1.0, 2.0], [0.0, 0.0]], dtype=torch.float64)}
    parts = [(lambda tensors: tensors["x"], lambda x: x.square().sum(1))]
    first = next(descend(lambda t: t["x"].sum(1), start, lambda *_: None, lambda _: {}, 0))
    *_, last = gauss_newton([first], parts, 3)
    assert not last.tensors["x"][1].any()
    # x - STEP_FRACTION * x / (1 + DAMPING), thrice
    torch.testing.assert_close(last.tensors["x"][0], start["x"][0] * (1 - STEP_FRACTION / (1 + DAMPING)) ** 3)


def test_chosen_for_a_checkpoint_and_shown(tiny: MemoryModel, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path)
    model, plain = gradmem.load(tmp_path, {"gauss_newton_after": 1}), gradmem.load(tmp_path)
    losses, curved = (made.write(TEXT, steps=3).receipts[0].losses for made in (plain, model))
    assert losses[:2] == curved[:2]
    assert curved[-1] < losses[-1]
    assert "gauss_newton_after 1" in str(results_table(evaluate(model, [1], 2)).title)
    assert "gauss_newton" not in str(results_table(evaluate(plain, [1], 2)).title)


def test_the_same_choices_have_the_same_hash_in_any_order(tmp_path: Path, tiny: MemoryModel) -> None:
    tiny.save_pretrained(tmp_path)
    one, other = gradmem.load(tmp_path), gradmem.load(tmp_path)
    for options in ({"chunk_size": 15}, {"gauss_newton_after": 1}):
        one.configure(options)
    for options in ({"gauss_newton_after": 1}, {"chunk_size": 15}):
        other.configure(options)
    assert one.overrides == {"chunk_size": 15, "chunk_mode": "sequential", "gauss_newton_after": 1}
    assert content_hash(one, [TEXT]) == content_hash(other, [TEXT])


def test_bad_uses_say_what_to_do(tiny: MemoryModel) -> None:
    with pytest.raises(GradmemError, match="gauss_newton_after must be"):
        make_gradmem().gauss_newton_after = -1
    pool = MemoryModel.from_spec(tiny.spec["task"], tiny.spec["backbone"], {"name": "mean_pool"})
    with pytest.raises(GradmemError, match=r"this checkpoint takes `chunk_size`, `chunk_mode`$"):
        pool.configure({"gauss_newton_after": 1})
