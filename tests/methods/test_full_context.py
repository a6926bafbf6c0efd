"""The key-value cache as memory against whole forward passes without a cache, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gradmem.batch import Batch, Tokens
from gradmem.errors import GradmemError
from gradmem.memory import Memory
from gradmem.methods import FullContext
from helpers import (
    KINDS,
    VOCABULARY,
    assert_same_gradients,
    distance,
    gradients,
    make_batch,
    make_method,
    random_tokens,
    real,
)

TOLERANCE = 1e-6
"""Transformers computes softmax and rotary tables in float32, even in a float64 model."""
# It biases attention by distance, and counts positions by the mask.
BLOOM = {"hidden_size": 16, "n_layer": 2, "n_head": 2}


def make_full(kind: str = "llama", *, config: dict[str, Any] | None = None) -> FullContext:
    return make_method(FullContext, kind, config=BLOOM if kind == "bloom" else config)


def whole(method: FullContext, ids: Tensor) -> Tensor:
    """Logits of one sequence in one forward pass."""
    model = method.backbone.model
    return model.get_output_embeddings()(model.base_model(ids[None]).last_hidden_state)[0]


@pytest.mark.parametrize("kind", [*KINDS, "bloom"])
def test_write_and_read_equal_one_forward(kind: str) -> None:
    """Values and all gradients, rows of different lengths, several queries for one context."""
    method, batch = make_full(kind), make_batch()
    logits = method.read(method.write(batch.context).memory, batch.queries, batch.rows)
    got, wanted = 0.0, 0.0
    for query, row in enumerate(batch.rows):
        ids = real(batch.queries, query)
        found, reference = logits[query, 1 : len(ids) + 1], whole(method, torch.cat([real(batch.context, row), ids]))
        assert distance(found, reference[-len(ids) :]) < TOLERANCE
        got, wanted = got + found.square().sum(), wanted + reference[-len(ids) :].square().sum()
    assert_same_gradients(gradients(got, method), gradients(wanted, method), 1e-5)


@pytest.mark.parametrize("kind", [*KINDS, "bloom"])
def test_targets_of_queries_in_one_row(kind: str) -> None:
    """As if each query were read alone, whichever context it asks; one is asked nothing."""
    method, context, queries = make_full(kind), random_tokens([7, 5, 8]), random_tokens([4, 6, 3, 2, 5], 1)
    rows = torch.tensor([2, 0, 2, 0, 2])
    labels = queries.ids.masked_fill(~queries.mask, -100)
    labels[:, 0] = -100
    found = method.read_targets(method.write(context).memory, Batch(context, queries, labels, rows))
    memory, wanted = method.write(context).memory, []
    for query, row in enumerate(rows.tolist()):
        alone = method.read(memory, queries[query : query + 1], torch.tensor([row]))[0]
        wanted.append(alone[1 : int(queries.lengths[query])])
    reference = torch.cat(wanted)
    assert distance(found, reference) < TOLERANCE
    got = gradients(found.square().sum(), method)
    assert_same_gradients(got, gradients(reference.square().sum(), method), 1e-5)


def test_bytes_are_those_of_the_tokens() -> None:
    of_token, length = 8 * 2 * 2 * 2 * 4, 8  # keys and values of 2 layers, 2 heads of width 4, float64
    context = random_tokens([7, 5])
    assert make_full().write(context).memory.nbytes == 12 * of_token + 2 * length
    assert make_full().write(context, 0).memory.nbytes == 2 * length


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bloom"])
def test_token_losses_continue_the_context(kind: str) -> None:
    method, context = make_full(kind), random_tokens([7, 5])
    losses = method.token_losses(method.write(context).memory, context)
    for row in range(2):
        ids = real(context, row)
        wanted = F.cross_entropy(whole(method, torch.cat([ids, ids[:-1]]))[len(ids) :], ids[1:], reduction="none")
        assert distance(losses[row, 1 : len(ids)], wanted) < TOLERANCE
        assert losses[row, 0].item() == pytest.approx(math.log(VOCABULARY))


@pytest.mark.parametrize("kind", [*KINDS, "bloom"])
def test_generate_is_greedy_reading(kind: str) -> None:
    """Rows and queries of different lengths."""
    method, context = make_full(kind), make_batch().context
    queries, rows = [[3, 1, 4, 1, 5], [9], [2, 6], [9]], [2, 0, 0, 1]
    memory = method.write(context).memory
    got = method.generate(memory, queries, torch.tensor(rows), max_new_tokens=6, do_sample=False)
    for query, row, answer in zip(queries, rows, got, strict=True):
        ids = list(query)
        for _ in range(6):
            logits = method.read(memory.select([row]), Tokens.from_lists([ids]))
            ids.append(int(logits[0, -1].argmax()))
        assert answer == ids[len(query) :]
    assert len(set(map(tuple, got))) > 2, "the test should see different answers"


@pytest.mark.parametrize("kind", [*KINDS, "bloom"])
def test_joined_prefixes_answer_as_each_alone(kind: str) -> None:
    """Contexts of different lengths, also where the model counts positions for itself."""
    method, context = make_full(kind), make_batch().context
    parts = [method.write(Tokens.from_lists([real(context, row).tolist()])).memory for row in range(3)]
    with torch.no_grad():
        first, *others = [method.prefix(part) for part in parts]
        hidden = method.read_hidden(first.join(others), Tokens.from_lists([[3, 1, 4]] * 3))
        for row, part in enumerate(parts):
            wanted = method.read_hidden(method.prefix(part), Tokens.from_lists([[3, 1, 4]]))[0]
            assert distance(hidden[row], wanted) < TOLERANCE


def test_refused() -> None:
    with pytest.raises(GradmemError, match="the limit is 20"):
        make_full().write(random_tokens([21]))
    memory = make_full().write(random_tokens([7, 5])).memory
    for change in (1, -6):
        with pytest.raises(GradmemError, match="it holds"):
            make_full().check(Memory({**memory.tensors, "lengths": memory.tensors["lengths"] + change}), "it")


def test_a_text_of_one_token_is_written() -> None:
    """Its receipt reads nothing before the token."""
    method = make_method(FullContext, "llama")
    context = Tokens.from_lists([[5]])
    memory = method.write(context).memory
    assert method.token_losses(memory, context).shape == (1, 1)
