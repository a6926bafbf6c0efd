"""ARMT against a naive reference in float64: one sample, one token's features and one memory token at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gradmem.batch import Tokens
from gradmem.errors import GradmemError
from gradmem.methods import ARMT
from helpers import (
    KINDS,
    TOLERANCE,
    assert_same_gradients,
    distance,
    gradients,
    make_batch,
    make_later_batch,
    make_method,
    random_tokens,
    real,
)

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "one_token": {"n_mem": 1},
    "nu_1": {"nu": 1, "d_mem": 3},
    "segments": {"segment_length": 3},
    "segments_no_correction": {"segment_length": 3, "correction": False},
    "segments_of_one": {"segment_length": 1, "n_mem": 3},
}


def make_armt(kind: str = "gpt2", **options: Any) -> ARMT:
    return make_method(ARMT, kind, **{"n_mem": 2, "d_mem": 4} | options)


# --- The naive reference ----------------------------------------------------------------------------------


def phi(vector: Tensor, nu: int) -> Tensor:
    """Features of one vector (d_mem,), element by element."""
    r = [max(x, 0 * x) for x in vector] + [max(-x, 0 * x) for x in vector]
    products = torch.stack([r[i] * r[(i - j) % len(r)] for j in range(1, nu + 1) for i in range(len(r))])
    return products / products.square().sum().sqrt() if products.any() else products


def naive_segment(method: ARMT, nu: int, correction: bool, ids: Tensor, state: list | None) -> tuple[Tensor, list]:
    """Hidden states (length, d) of one unpadded segment of a Llama, and what its layers hold afterwards."""
    model, tokens = method.backbone.model.model, len(ids)
    x = torch.cat([model.embed_tokens(ids), method.memory_tokens])
    seen = torch.tensor([[j < tokens and j <= i for j in range(len(x))] for i in range(len(x))])
    seen[tokens:] = True
    mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)[None, None]
    rotary = model.rotary_emb(x[None], torch.arange(len(x))[None])
    after = []
    for index, (block, layer) in enumerate(zip(model.layers, method.associative, strict=True)):
        if state is not None:
            a, z = state[index]
            queries = [phi(layer.query.weight @ row, nu) for row in x]
            x = torch.stack([row + q @ a / (q @ z + 1e-5) for row, q in zip(x, queries, strict=True)])
        x = block(x[None], attention_mask=mask, position_embeddings=rotary)[0]
        features, d = 2 * nu * layer.query.out_features, x.shape[1]
        old_a, old_z = state[index] if state else (torch.zeros(features, d).double(), torch.zeros(features).double())
        a, z = old_a, old_z
        for row in x[tokens:]:
            k, v = phi(layer.key.weight @ row, nu), layer.value.weight @ row
            b = torch.sigmoid(layer.strength.weight[0] @ row + layer.strength.bias[0])
            if state is None:
                a, z = a + b * torch.outer(k, v), z + k
                continue
            known = k @ old_z + 1e-5
            g = min(max(1 - (known / (k @ k)).item(), 0.0), 1.0) if correction else 1.0
            a, z = a + b * torch.outer(k, v - k @ old_a / known), z + g * k
        after.append((a, z))
    return model.norm(x[None])[0, :tokens], after


def naive_write(method: ARMT, nu: int, correction: bool, length: int | None, ids: Tensor) -> list:
    state = None
    for segment in ids.split(length or len(ids)):
        _, state = naive_segment(method, nu, correction, segment, state)
    return state


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_naive(name: str) -> None:
    """State, logits, loss and all gradients; the naive query has its memory tokens behind it, as published."""
    options, data = OPTIONS[name], make_later_batch()
    method = make_armt("llama", **options)
    nu, correction = options.get("nu", 3), options.get("correction", True)
    memory = method.write(data.context).memory
    logits = method.read(memory, data.queries, data.rows)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), data.labels.flatten())

    length = options.get("segment_length")
    states = [naive_write(method, nu, correction, length, real(data.context, row)) for row in range(3)]
    for row, state in enumerate(states):
        for layer, (a, z) in enumerate(state):
            assert distance(memory.tensors[f"layers.{layer}.A"][row], a) < TOLERANCE
            assert distance(memory.tensors[f"layers.{layer}.z"][row], z) < TOLERANCE
    wanted, count = torch.zeros(()).double(), 0
    for query, row in enumerate(data.rows):
        ids = real(data.queries, query)
        hidden, _ = naive_segment(method, nu, correction, ids, states[row])
        wanted_logits = method.backbone.head(hidden)
        assert distance(logits[query, 1 : len(ids) + 1], wanted_logits) < TOLERANCE
        for t, label in enumerate(data.labels[query, : len(ids)]):
            if label != -100:
                wanted, count = wanted + F.cross_entropy(wanted_logits[t - 1], label), count + 1
    wanted = wanted / count
    assert loss.item() == pytest.approx(wanted.item(), rel=TOLERANCE)
    grads = gradients(loss, method)
    assert_same_gradients(grads, gradients(wanted, method))
    assert all(grad.any() for name, grad in grads.items() if name.startswith(("associative", "memory_tokens")))


# --- Starts, batches, segments ----------------------------------------------------------------------------


def test_reading_starts_as_doing_nothing() -> None:
    """Values start at zero, so the first answers are the backbone's own, and only values take a gradient."""
    torch.manual_seed(0)
    data, backbone = make_later_batch(), make_armt().backbone
    method = ARMT(backbone, n_mem=2, d_mem=4)
    logits = method.read(method.write(data.context).memory, data.queries, data.rows)
    plain = backbone.model(input_ids=data.queries.ids, attention_mask=data.queries.mask.long()).logits
    assert distance(logits[:, 1:][data.queries.mask], plain[data.queries.mask]) < TOLERANCE
    grads = gradients(F.cross_entropy(logits[:, :-1].flatten(0, 1), data.labels.flatten()), method)
    moved = {name.split(".")[2] for name, grad in grads.items() if name.startswith("associative") and grad.any()}
    assert moved == {"value"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [None, 3])
def test_neighbours_order_and_pads_change_nothing(kind: str, length: int | None) -> None:
    """Rows that end in an earlier segment than others included."""
    method, context = make_armt(kind, segment_length=length), random_tokens([7, 4, 9, 1])
    together = method.write(context).memory.tensors
    losses = method.token_losses(method.write(context).memory, context)
    shuffled = torch.tensor([2, 0, 3, 1])
    again = method.write(context[shuffled]).memory.tensors
    for name, tensor in together.items():
        assert min(distance(tensor[i], tensor[j]) for i in range(4) for j in range(i)) > 1e-3
        assert distance(again[name], tensor[shuffled]) < TOLERANCE
    for row in range(4):
        ids = real(context, row)[None]
        own = Tokens(ids, torch.ones_like(ids, dtype=torch.bool))
        alone = method.write(own).memory
        for name, tensor in together.items():
            assert distance(tensor[row], alone.tensors[name][0]) < TOLERANCE, name
        assert distance(losses[row, : ids.shape[1]], method.token_losses(alone, own)[0]) < TOLERANCE
        assert not losses[row, ids.shape[1] :].any()


def test_leaking_pads_changes_padded_rows_only() -> None:
    context = random_tokens([7, 4])
    clean, leaking = (make_armt("llama", leak_pads=leak).write(context).memory.tensors for leak in (False, True))
    for name, tensor in clean.items():
        assert distance(leaking[name][0], tensor[0]) < TOLERANCE
        assert distance(leaking[name][1], tensor[1]) > 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_segments_carry_contexts_beyond_the_backbone(kind: str) -> None:
    method, context = make_armt(kind, segment_length=20), random_tokens([90])
    assert method.max_context > 90 > method.backbone.max_positions == method.max_query
    written = method.write(context)
    assert all(tensor.isfinite().all() for tensor in written.memory.tensors.values())
    assert method.token_losses(written.memory, context).isfinite().all()
    whole = make_armt(kind)
    assert whole.max_context == 38
    assert whole.write(random_tokens([38])).taken.tolist() == [1]
    with pytest.raises(GradmemError, match="limit is 38"):
        whole.write(random_tokens([39]))


# --- Steps ------------------------------------------------------------------------------------------------


def test_one_step_is_all_there_is() -> None:
    method, context = make_armt(), make_batch().context
    empty, full = method.trajectory(context, 5)
    assert not any(tensor.any() for tensor in empty.memory.tensors.values())
    assert [state.taken.tolist() for state in (empty, full)] == [[0] * 3, [1] * 3]
    assert full.losses.shape == (0, 3)
    assert method.write_loss(full, context) == 0
    assert len(list(method.trajectory(context, 0))) == 1
    with pytest.raises(GradmemError, match=r"until.*write loss"):
        method.write(context, until=1.0)


def test_an_unwritten_memory_reads_as_the_backbone_alone() -> None:
    method, data = make_armt(), make_batch()
    with torch.no_grad():
        logits = method.read(method.write(data.context, 0).memory, data.queries, data.rows)
        plain = method.backbone.model(input_ids=data.queries.ids, attention_mask=data.queries.mask.long()).logits
    assert distance(logits[:, 1:][data.queries.mask], plain[data.queries.mask]) < TOLERANCE
    assert not logits[:, 0].any(), "nothing predicts the first token"


# --- Read -------------------------------------------------------------------------------------------------


def test_layers_read_only_while_a_prefix_is_active() -> None:
    """After reading, and after an error in it, the backbone is what it was."""
    method, data = make_armt(), make_batch()
    hooks = [hooks for block in method.backbone.blocks for hooks in (block._forward_pre_hooks, block._forward_hooks)]
    before = method.backbone.hidden(method.backbone.embed(data.queries.ids))
    memory = method.write(data.context).memory
    assert not any(hooks)
    with method.prefix(memory).active():
        assert any(hooks)
    assert not any(hooks)
    with pytest.raises(IndexError):
        method.read(memory, Tokens(data.queries.ids + 1000, data.queries.mask), data.rows)
    assert not any(hooks)
    assert torch.equal(method.backbone.hidden(method.backbone.embed(data.queries.ids)), before)


def greedy(method: ARMT, prefix: Any, query: list[int], steps: int) -> list[int]:
    ids = list(query)
    for _ in range(steps):
        # A prefix of one row, taken anew: reading extends its cache.
        hidden = method.read_hidden(prefix.select(torch.tensor([0])), Tokens.from_lists([ids]))
        ids.append(int(method.backbone.head(hidden)[0, -1].argmax()))
    return ids[len(query) :]


@pytest.mark.parametrize("kind", KINDS)
def test_generate_is_greedy_reading(kind: str) -> None:
    """Queries of different lengths, several for one memory, against step-by-step argmax without a cache."""
    method, context = make_armt(kind), make_batch().context
    queries, rows = [[3, 1, 4, 1, 5], [9], [2, 6], [9]], [2, 0, 0, 1]
    memory = method.write(context).memory
    got = method.generate(memory, queries, torch.tensor(rows), max_new_tokens=5, do_sample=False)
    with torch.no_grad():
        for query, row, answer in zip(queries, rows, got, strict=True):
            assert answer == greedy(method, method.prefix(memory[row]), query, 5)
    assert got[1] != got[3], "the memories should matter"


def test_beams_read_their_own_memory() -> None:
    """Each query finds the same beams in company as alone."""
    method, context = make_armt("llama"), make_batch().context
    memory = method.write(context).memory
    options = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    queries, rows = [[3, 1, 4], [9], [9]], [2, 0, 1]
    together = method.generate(memory, queries, torch.tensor(rows), **options)
    alone = [method.generate(memory, [q], torch.tensor([row]), **options) for q, row in zip(queries, rows, strict=True)]
    assert together == [answer for answers in alone for answer in answers]


# --- Refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"n_mem": 0}, {"d_mem": 0}, {"nu": 0}, {"segment_length": 0}, {"segment_length": 39}], ids=str
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(GradmemError, match=next(iter(options))):
        make_armt(**options)


def test_memories_of_other_shapes_are_refused() -> None:
    context = make_batch().context
    memory = make_armt(d_mem=3).write(context).memory
    make_armt(d_mem=3).check(memory, "this file")
    with pytest.raises(GradmemError, match="this file holds"):
        make_armt(d_mem=4).check(memory, "this file")
