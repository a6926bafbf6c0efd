"""GradMem that starts from pooled hidden states, against a loop over tokens and against the whole context."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gradmem import GradmemError
from gradmem.batch import Tokens
from gradmem.cli.evaluation_tables import results_table
from gradmem.evaluation import evaluate
from gradmem.exports.keys_values import keys_values
from gradmem.inner import Strategy
from gradmem.memory import Memory
from gradmem.methods import FullContext
from gradmem.methods.base import pooled_gradmem
from gradmem.methods.base.head_prefix import HeadPrefix
from gradmem.methods.base.pooled_gradmem import PooledGradMem, Pooling
from gradmem.model.build import build_method
from gradmem.ops.layer_input import layer_input
from helpers import (
    Numbers,
    check_slopes,
    distance,
    make_later_batch,
    make_method,
    random_tokens,
    read_loss,
    refused_in_one_line,
    saved_and_opened,
)

ROTATION = 2e-5
"""Of what depends on rotary angles, which Transformers computes in float32 whatever the weights are."""
POOLED: dict[str, Any] = {"start": "pooled", "layer": 1, "n_mem": 4}
LEARNED: dict[str, Any] = {"learn_inner_lr": True, "write_steps": 2, "inner_lr": 0.3}


def build(kind: str = "llama", **options: Any) -> PooledGradMem:
    method = make_method(PooledGradMem, kind, config={"max_position_embeddings": 256}, **POOLED | options)
    method.task = Numbers()
    return method


def pour(pooling: Pooling, states: Tensor, count: int) -> tuple[Tensor, list[int]]:
    """Pool the states of one text (length, d) as a loop: pour weight into vectors of one unit each until all is out."""
    scores = [float(F.layer_norm(state, state.shape) @ pooling.weights.score) for state in states[1:]]
    parts = min(count - 1, len(scores))
    weights = [parts * math.exp(score) / sum(map(math.exp, scores)) for score in scores]
    vectors, places, vector, place, room = [states[0]], [0], torch.zeros_like(states[0]), 0.0, 1.0
    for token, weight in enumerate(weights, 1):
        while weight > 1e-12:
            share = min(weight, room)
            vector, place = vector + share * states[token], place + share * token
            weight, room = weight - share, room - share
            if room < 1e-12:
                vectors.append(vector)
                places.append(round(place))
                vector, place, room = torch.zeros_like(states[0]), 0.0, 1.0
    rest = count - len(vectors)
    return torch.stack([*vectors, *[torch.zeros_like(states[0])] * rest]), [*places, *[0] * rest]


@torch.no_grad()
def test_pooling_equals_pouring_weight_into_vectors() -> None:
    """Rows of many, few and one token; the pads of a row are no part of it."""
    pooling = build().pooling
    states = torch.randn(4, 11, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    lengths = [11, 6, 3, 1]
    mask = torch.arange(11) < torch.tensor(lengths)[:, None]
    vectors, positions = pooling(states, mask, 4)
    for row, length in enumerate(lengths):
        wanted, places = pour(pooling, states[row, :length], 4)
        assert distance(vectors[row], wanted) < 1e-9
        assert positions[row].tolist() == places


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_with_a_vector_for_each_token_it_reads_the_whole_context(kind: str, layer: int) -> None:
    """From its layer on; the layers below see nothing of the context."""
    method, batch = build(kind, n_mem=8, layer=layer, write_steps=0), make_later_batch()
    method.pooling.weights.score.zero_()
    memory = method.write(batch.context).memory
    full = FullContext(method.backbone)
    cached = full.write(batch.context).memory
    for row in range(len(batch.context)):
        asked = batch.queries[(batch.rows == row).nonzero()[:, 0]]
        rows = torch.full((len(asked),), row)
        prefix = full.prefix(cached[row])
        hidden = torch.zeros(1, 2, prefix.cache.layers[0].keys.shape[1], prefix.length, dtype=torch.bool)
        hidden[:, :layer] = True
        wanted = full.read_hidden(HeadPrefix(prefix, method.backbone, hidden).select(0 * rows), asked)
        got = method.read_hidden(method.prefix(memory).select(rows), asked)
        assert distance(got[:, 1:], wanted[:, 1:]) < ROTATION


@torch.no_grad()
def test_layers_below_see_no_memory() -> None:
    method, batch = build(), make_later_batch()
    prefix, block = method.prefix(method.write(batch.context).memory).select(batch.rows), method.backbone.blocks[1]
    beyond = layer_input(block, lambda: method.read_hidden(prefix, batch.queries))
    embeds, positions = method.backbone.embed(batch.queries.ids), prefix.continued(batch.queries.ids.shape[1])
    alone = layer_input(block, lambda: method.backbone.hidden(embeds, positions=positions["positions"]))
    assert distance(beyond, alone) < ROTATION


@pytest.mark.parametrize("strategy", ["unroll", "recompute", "compile"])
def test_the_meta_gradient_is_the_derivative(strategy: Strategy) -> None:
    """Through reading, pooling, steps and questions, by finite differences; positions are whole numbers and stay."""
    method, batch = build(**LEARNED), make_later_batch()
    method.strategy = strategy
    names = {"log_inner_lr", "log_coordinate_lr", "pooling.weights.score", "loss_weights.score"}
    names |= {"backbone.model.model.layers.0.self_attn.v_proj.weight"}
    check_slopes(method, lambda: read_loss(method, batch), names | {"backbone.model.model.layers.1.mlp.up_proj.weight"})


def test_a_step_follows_weighted_tokens_at_the_rates_of_vector_and_coordinate() -> None:
    method, context = build(**LEARNED), make_later_batch().context
    start = method.write(context, 0).memory
    with torch.no_grad():
        embeds = method.backbone.embed(context.ids)
        states = layer_input(method.backbone.blocks[1], lambda: method.backbone.hidden(embeds))
    for row, length in enumerate(context.lengths.tolist()):
        own, text = start[row], context[row : row + 1]
        score = method.loss_weights.score.detach()
        scores = [float(F.layer_norm(state, state.shape) @ score) for state in states[row, :length]]
        weights = [length * math.exp(score) / sum(map(math.exp, scores)) for score in scores]
        vectors = own.tensors["memory"].detach().requires_grad_()
        losses = method.token_losses(Memory(own.tensors | {"memory": vectors}), text)[0, :length]
        loss = sum(weight * one for weight, one in zip(weights, losses, strict=True)) / length
        (slope,) = torch.autograd.grad(loss, vectors)
        rates = method.log_inner_lr.exp() * method.log_coordinate_lr.exp()
        written = method.write(context, 1)
        assert abs(float(written.losses[0, row] - loss)) < ROTATION
        assert distance(written.memory[row].tensors["memory"], vectors - rates * slope) < ROTATION
        assert len(set(weights)) == length > 1


@torch.no_grad()
def test_a_context_is_written_alike_beside_others() -> None:
    method, context = build(**LEARNED), random_tokens([9, 2, 1, 5])
    together = method.write(context)
    for row in range(len(context)):
        alone = method.write(context[torch.tensor([row])])
        assert torch.allclose(alone.losses[:, 0], together.losses[:, row])
        assert all(torch.allclose(together.memory[row].tensors[k], t) for k, t in alone.memory.tensors.items())


@torch.no_grad()
def test_steps_lower_the_loss_of_repeating_the_context() -> None:
    losses = build(**LEARNED | {"inner_lr": 0.05}).write(make_later_batch().context, 4).losses
    assert bool((losses[1:] < losses[:-1]).all())


@torch.no_grad()
@pytest.mark.parametrize("room", [True, False])
def test_chunks_are_read_as_one_text(room: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a vector for each token of two chunks. Where the model has no positions for both, each begins at 0."""
    method = build(n_mem=8, layer=0, write_steps=0)
    monkeypatch.setattr(pooled_gradmem, "QUESTION_ROOM", 200 if room else 250)
    method.pooling.weights.score.zero_()
    text, queries = random_tokens([9]), random_tokens([4], 3)
    chunks = Tokens(
        torch.cat([text.ids[:, :6], F.pad(text.ids[:, 6:], (0, 3))]), torch.arange(6) < torch.tensor([[6], [3]])
    )
    memory = method.together(method.write(chunks).memory)
    positions = [0, 1, 2, 3, 4, 5, *([7, 8, 9] if room else [1, 2, 6])]
    assert memory.tensors["positions"].tolist() == [positions[:-1]]
    ids = torch.cat([text.ids[:, :6], text.ids[:, 7:]], 1)
    embeds = torch.cat([method.backbone.embed(ids), method.backbone.embed(queries.ids)], 1)
    places = torch.tensor([[*positions, *(positions[-1] + number for number in (1, 2, 3))]])
    wanted = method.backbone.head(method.backbone.hidden(embeds, positions=places))[:, 8:]
    assert distance(method.read(memory, queries)[:, 1:], wanted) < ROTATION


@torch.no_grad()
def test_the_memory_of_no_text_is_none() -> None:
    method, batch = build(), make_later_batch()
    got = method.read(method.without_text(1), batch.queries, torch.zeros(5, dtype=torch.long))
    wanted = method.backbone.head(method.backbone.hidden(method.backbone.embed(batch.queries.ids)))
    assert distance(got[:, 1:], wanted) < ROTATION


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"memory": "keys_values"}, "start is not used with `memory: keys_values`: leave it out"),
        ({"n_ctrl": 1}, "n_ctrl is not used with `start: pooled`: leave it out"),
        ({"layer": 2}, "layer must be at most 1, the last layer of this model"),
        ({"start": "learned"}, "layer is used with `start: pooled`: leave it out"),
        ({"layer": -1}, "layer must be at least 0"),
        ({"budget": 0.1}, "budget must be a fraction above 0 and up to 1, with `start: select`"),
        ({"write_objective": "attention"}, "write_objective must be reconstruction"),
    ],
    ids=str,
)
def test_bad_options_get_one_line(options: dict[str, Any], wanted: str) -> None:
    with refused_in_one_line(wanted):
        build_method({"name": "gradmem", **POOLED, **options}, build().backbone)


def test_a_saved_model_writes_saves_answers_and_is_measured(tmp_path: Path) -> None:
    spec = {"name": "gradmem", **POOLED, "learn_inner_lr": True, "write_steps": 2}
    model, memory = saved_and_opened(spec, tmp_path, layers=2)
    assert len(memory.receipts[0].losses) == 3
    start, result = evaluate(model, [0, 2], samples=4)
    assert start.from_context
    assert start.unwritten == result.unwritten
    rows = [[str(cell) for cell in column.cells] for column in results_table([start, result]).columns]
    assert rows[0] == ["start", "written", "control: unwritten", "control: swapped"]
    with pytest.raises(GradmemError, match="some layers or heads see a part of the memory only"):
        keys_values(memory[0])


def test_a_memory_with_impossible_numbers_is_refused() -> None:
    method = build()
    tensors = method.without_text(2).tensors
    for name in ("positions", "start"):
        for value in (-1, 10**6):
            with pytest.raises(GradmemError, match=f"it has {name} that are no numbers of tokens from 0 to"):
                method.check(Memory(tensors | {name: torch.full_like(tensors[name], value)}), "it")
    with pytest.raises(GradmemError, match="but this method writes"):
        method.check(Memory({"memory": tensors["memory"]}), "it")
