"""GradMem that starts from the context's own cache, against a naive reference and compact's own choice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gradmem.compaction.text import read_repeated
from gradmem.evaluation import evaluate
from gradmem.inner import Strategy
from gradmem.methods.base.started_gradmem import StartedGradMem
from gradmem.methods.compact import Compact
from gradmem.model.build import build_method
from helpers import (
    Numbers,
    check_slopes,
    distance,
    gradients,
    make_later_batch,
    make_method,
    read_loss,
    real,
    refused_in_one_line,
    saved_and_opened,
)
from naive_started import NaiveStarted

ROTATION = 2e-5
"""Of what depends on rotary angles, which Transformers computes in float32 whatever the weights are."""
STARTED: dict[str, Any] = {"memory": "keys_values", "start": "select", "n_mem": 3}
BEFORE = [3, 5]
"""Tokens before every context."""
LEARNED: dict[str, Any] = {"learn_inner_lr": True, "learn_momentum": True, "write_steps": 3, "inner_lr": 0.3}


def build(cls: Any = StartedGradMem, **options: Any) -> Any:
    method = make_method(cls, "llama", config={"max_position_embeddings": 256}, **options)
    method.task = Numbers(BEFORE)
    return method


@pytest.mark.parametrize("objective", ["reconstruction", "attention", "reconstruction,attention"])
def test_equals_naive(objective: str) -> None:
    """Losses of the steps, everything written, the loss of reading, and its gradient for rates, momentum and model."""
    method, batch = build(**STARTED, **LEARNED, write_objective=objective), make_later_batch()
    reference = NaiveStarted(method, objective.split(","), 3, 3, BEFORE, Numbers().encode_query("Re"))
    written = method.write(batch.context)
    for row in range(len(batch.context)):
        heads, losses = reference.write(real(batch.context, row).tolist())
        assert torch.allclose(written.losses[:, row], torch.stack(losses), rtol=ROTATION)
        for name in ("keys", "values"):
            wanted = torch.cat([head[name[:-1]] for layer in heads for head in layer])
            assert distance(written.memory.tensors[name][row], wanted) < ROTATION
    loss, wanted = read_loss(method, batch), reference.outer_loss(batch)
    assert loss.item() == pytest.approx(wanted.item(), rel=ROTATION)
    got, right = gradients(loss, method), gradients(wanted, method)
    for name in ("log_inner_lr.key", "log_inner_lr.value", "momentum", "backbone.model.model.embed_tokens.weight"):
        assert right[name].any()
        assert distance(got[name], right[name]) < 50 * ROTATION, name


@pytest.mark.parametrize(("strategy", "shared"), [("unroll", False), ("recompute", True), ("compile", True)])
def test_the_meta_gradient_is_the_derivative(strategy: Strategy, shared: bool) -> None:
    """Through reading, start, steps and questions, by finite differences: which entries are kept does not change."""
    method, batch = build(**STARTED, **LEARNED, shared=shared), make_later_batch()
    method.strategy = strategy
    names = {"log_inner_lr.key", "log_inner_lr.value", "momentum"}
    names |= {f"backbone.model.model.layers.{layer}.self_attn.{name}_proj.weight" for layer in (0, 1) for name in "kv"}
    check_slopes(method, lambda: read_loss(method, batch), names)


@pytest.mark.parametrize(
    "options",
    [{"start": "select", "budget": 0.4}, {"start": "match"}, {"start": "select", "budget": 0.4, "shared": True}],
    ids=str,
)
def test_without_steps_it_reads_what_compact_keeps(options: dict[str, Any]) -> None:
    """The same entries, and the same logits."""
    method, batch = build(**STARTED | options), make_later_batch()
    budget, start = options.get("budget", STARTED["n_mem"]), options["start"]
    writers = "select" if start == "select" else "select,match"
    compact = Compact(method.backbone, budget=budget, writers=writers, shared=options.get("shared", False))
    compact.task, compact.mover = Numbers(BEFORE), method.mover
    with torch.no_grad():
        memory = method.write(batch.context, 0).memory
        for row in range(len(batch.context)):
            text = read_repeated(compact.backbone, compact.task, real(batch.context, row).tolist())
            *_, (name, wanted) = compact.compacted(text, budget)
            assert name == start
            assert all(torch.equal(memory[row].tensors[key], tensor) for key, tensor in wanted.tensors.items())
            asked = batch.queries[(batch.rows == row).nonzero()[:, 0]]
            rows = torch.full((len(asked),), row)
            got, right = method.read(memory, asked, rows), compact.read(wanted, asked, torch.zeros_like(rows))
            assert distance(got[:, 1:], right[:, 1:]) < 1e-12


@pytest.mark.parametrize("shared", [False, True])
def test_a_context_is_written_alike_beside_others(shared: bool) -> None:
    """Contexts of different lengths keep different numbers of entries; those of the others are no part of it."""
    method = build(**STARTED, budget=0.4, shared=shared, write_objective="reconstruction,attention")
    batch = make_later_batch()
    with torch.no_grad():
        together = method.write(batch.context)
        assert len(set(together.memory.tensors["lengths"].tolist())) > 1
        for row in range(len(batch.context)):
            alone = method.write(batch.context[torch.tensor([row])])
            assert torch.allclose(alone.losses[:, 0], together.losses[:, row])
            got = together.memory[row].tensors
            assert all(torch.allclose(got[key], tensor) for key, tensor in alone.memory.tensors.items())


def test_a_start_that_is_matched_lets_gradients_pass() -> None:
    """To the entries as they were, since the moves of matching are constants."""
    method, batch = build(**STARTED | {"start": "match"}, write_steps=1), make_later_batch()
    grads = gradients(read_loss(method, batch), method)
    assert grads["backbone.model.model.layers.0.self_attn.v_proj.weight"].any()


def test_answers_come_closer_to_those_of_the_whole_context() -> None:
    method, batch = build(**STARTED, write_objective="answers", inner_lr=0.1, write_steps=4), make_later_batch()
    with torch.no_grad():
        losses = method.write(batch.context).losses
    assert bool((losses[1:] < losses[:-1]).all())


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"memory": "vectors"}, "start is not used with `memory: vectors`: leave it out"),
        ({"n_ctrl": 1}, "n_ctrl is not used with `memory: keys_values`"),
        ({"chunk_size": 4}, "chunk_size is not used with `start: select`: leave it out"),
        ({"write_objective": "energy"}, "write_objective must be reconstruction or attention or answers, or several"),
        ({"write_objective": "attention,attention"}, "write_objective must be"),
        ({"budget": 1.5}, "budget must be a fraction above 0 and up to 1"),
        ({"start": "learned", "budget": 0.1}, "budget must be a fraction above 0 and up to 1, with `start: select`"),
        ({"start": "learned", "write_objective": "attention"}, "write_objective must be reconstruction or energy"),
        ({"start": "learned", "shared": True}, "shared is used with `start: select` or `match`: leave it out"),
        ({"start": "best"}, "start must be learned, pooled, select or match"),
    ],
    ids=str,
)
def test_bad_options_get_one_line(options: dict[str, Any], wanted: str) -> None:
    with refused_in_one_line(wanted):
        build_method({"name": "gradmem", **STARTED, **options}, build().backbone)


def test_a_saved_model_writes_saves_answers_and_is_measured(tmp_path: Path) -> None:
    """The control is the memory of no text, since the start already holds some of it."""
    model, memory = saved_and_opened({"name": "gradmem", **STARTED, "learn_inner_lr": True, "write_steps": 2}, tmp_path)
    assert len(memory.receipts[0].losses) == 3
    (result,) = evaluate(model, samples=4)
    assert 0 <= result.unwritten <= 1
    nothing = model.method.without_text(2)
    assert nothing.tensors["keys"].shape[:2] == (2, 0)
