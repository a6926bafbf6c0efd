"""Adapters of WRITE and of READ, and frozen backbones, against merged weights and the naive reference, in float64."""

from __future__ import annotations

import pytest
import torch

from gradmem.inner import Strategy
from gradmem.memory import Memory
from gradmem.methods import GradMem
from gradmem.training.plan import AUTO
from helpers import (
    KINDS,
    TOLERANCE,
    check_slopes,
    distance,
    make_batch,
    make_gradmem,
    naive,
    outer_loss,
    real,
)

LORAS = [{"write_lora": 2}, {"read_lora": 3}, {"write_lora": 2, "read_lora": 3}]


def merged(adapted: GradMem, kind: str, phase: str | None) -> GradMem:
    """The same GradMem without adapters, those of a phase added to its weights."""
    weights, plain, count = dict(adapted.named_parameters()), make_gradmem(kind), 0
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            layer, _, leaf = name.rpartition(".")
            parameter.copy_(weights.get(name, weights.get(f"{layer}.base_layer.{leaf}")))
            if f"{layer}.lora_A.{phase}.weight" in weights and leaf == "weight":
                change = weights[f"{layer}.lora_B.{phase}.weight"] @ weights[f"{layer}.lora_A.{phase}.weight"]
                assert change.norm() > 0.1
                parameter.add_(change.T if kind == "gpt2" else change)
                count += 1
    assert count == sum(f"lora_A.{phase}." in name for name in weights)
    return plain


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", LORAS, ids=str)
def test_adapters_act_in_their_phase_only(kind: str, options: dict[str, int]) -> None:
    adapted, batch = make_gradmem(kind, **options), make_batch()
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) >= 8 * len(options), "both blocks' matrices"
    plain = merged(adapted, kind, None)
    writer = merged(adapted, kind, "write") if "write_lora" in options else plain
    reader = merged(adapted, kind, "read") if "read_lora" in options else plain
    generate = {"queries": [[1, 2], [3]], "rows": torch.tensor([0, 2]), "max_new_tokens": 4}
    with torch.no_grad():
        memory = writer.write(batch.context).memory
        before = adapted.read(memory, batch.queries, batch.rows)
        written = adapted.write(batch.context).memory.tensors["memory"]
        assert distance(written, memory.tensors["memory"]) < TOLERANCE
        assert distance(adapted.token_losses(memory, batch.context), writer.token_losses(memory, batch.context)) < 1e-12
        logits = adapted.read(memory, batch.queries, batch.rows)
        assert torch.equal(logits, before)
        assert distance(logits, reader.read(memory, batch.queries, batch.rows)) < TOLERANCE
        assert adapted.generate(memory, **generate) == reader.generate(memory, **generate)
        if "write_lora" in options:
            assert distance(written, plain.write(batch.context).memory.tensors["memory"]) > 1e-3
        if "read_lora" in options:
            assert distance(logits, plain.read(memory, batch.queries, batch.rows)) > 1e-3


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_adapted_reading_equals_naive(kind: str) -> None:
    """Against a forward of the whole input through weights that the adapters are added to."""
    adapted, batch = make_gradmem(kind, read_lora=2, write_lora=2), make_batch()
    writer, reader = naive(merged(adapted, kind, "write")), naive(merged(adapted, kind, "read"))
    with torch.no_grad():
        memory = adapted.write(batch.context).memory
        logits = adapted.read(memory, batch.queries, batch.rows)
        first, *others = (adapted.prefix(memory[row]) for row in batch.rows.tolist())
        joined = adapted.backbone.head(adapted.read_hidden(first.join(others), batch.queries))
    assert distance(joined, logits) < TOLERANCE
    for query, row in enumerate(batch.rows):
        ids = real(batch.queries, query)
        wanted = reader.read(writer.write(real(batch.context, row))[0], ids)
        assert distance(logits[query, : len(ids) + 1], wanted) < TOLERANCE


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_fresh_adapters_change_nothing(kind: str) -> None:
    method, batch = make_gradmem(kind, write_lora=2, read_lora=2), make_batch()
    with torch.no_grad():
        for name, parameter in method.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    plain = merged(method, kind, None)
    wanted = plain.write(batch.context).memory.tensors["memory"]
    assert distance(method.write(batch.context).memory.tensors["memory"], wanted) < 1e-12
    logits = method.read(Memory({"memory": wanted}), batch.queries, batch.rows)
    assert distance(logits, plain.read(Memory({"memory": wanted}), batch.queries, batch.rows)) < 1e-12


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("strategy", AUTO)
@pytest.mark.parametrize("freeze", [False, True])
def test_adapters_get_second_order_gradients(kind: str, strategy: Strategy, freeze: bool) -> None:
    batch = make_batch()
    method = make_gradmem(kind, write_lora=2, read_lora=2, freeze_backbone=freeze, write_head="copy", n_ctrl=1)
    method.strategy = strategy
    names = {name for name, _ in method.named_parameters() if "lora_" in name}
    trained = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    own = {name for name, _ in method.named_parameters() if not name.startswith("backbone.")}
    assert trained == names | own if freeze else trained == {name for name, _ in method.named_parameters()}
    outer_loss(method, batch)[0].backward()
    for name, parameter in method.named_parameters():
        if name in trained:
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name
        else:
            assert parameter.grad is None, name
    if not freeze and strategy == "recompute":
        check_slopes(method, lambda: outer_loss(method, batch)[0], names, h=2e-6)


@pytest.mark.parametrize("order", ["second", "first"])
def test_a_frozen_backbone_gets_no_gradients_and_the_rest_keeps_its_own(order: str) -> None:
    options = {"order": order, "n_ctrl": 1, "projection": "proj", "learn_inner_lr": True}
    frozen, free = make_gradmem(freeze_backbone=True, **options), make_gradmem(**options)
    for method in (frozen, free):
        outer_loss(method, make_batch(), auxiliary=0.5)[0].backward()
    for name, parameter in free.named_parameters():
        got = frozen.get_parameter(name).grad
        if name.startswith("backbone."):
            assert got is None, name
        else:
            assert distance(got, parameter.grad) < 1e-12, name
