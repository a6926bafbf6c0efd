"""What GradMem reads and generates, against full forward passes in float64; how it is built."""

from __future__ import annotations

import pytest
import torch

from gradmem.errors import GradmemError
from gradmem.methods import GradMem
from helpers import KINDS, TOLERANCE, VOCABULARY, distance, make_batch, make_gradmem, naive, real


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"n_mem": 1}, {"n_ctrl": 2, "projection": "per_sample"}], ids=str)
def test_read_equals_a_forward_without_cache(kind: str, options: dict) -> None:
    """Every row of queries sees its own memory, and pads and neighbours change nothing."""
    method, batch = make_gradmem(kind, **options), make_batch()
    reference = naive(method, **options)
    with torch.no_grad():
        memory = method.write(batch.context).memory
        logits = method.read(memory, batch.queries, batch.rows)
        plain = method.read(memory, batch.queries[:3])
        assert logits.shape == (5, 7, VOCABULARY)
        for query, row in enumerate(batch.rows):
            ids = real(batch.queries, query)
            for got, source in ((logits, row), (plain, query)):
                if query < len(got):
                    own = {name: tensor[source] for name, tensor in memory.tensors.items()}
                    assert distance(got[query, : len(ids) + 1], reference.read(own, ids)) < TOLERANCE
        targets = method.read_targets(memory, batch)
    torch.testing.assert_close(targets, logits[:, :-1][batch.labels != -100])


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_serves_many_reads(kind: str) -> None:
    """Reading a selection of a prefix leaves the prefix as it was."""
    method, batch = make_gradmem(kind), make_batch()
    with torch.no_grad():
        prefix = method.prefix(method.write(batch.context).memory)
        first, again = (method.read_hidden(prefix.select(batch.rows), batch.queries) for _ in range(2))
    assert torch.equal(first, again)
    assert prefix.length == 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"n_mem": 1}, {"n_ctrl": 1, "projection": "proj"}], ids=str)
def test_generate_is_greedy_reading(kind: str, options: dict) -> None:
    """Queries of different lengths, several for one memory, against step-by-step argmax without a cache."""
    method, context = make_gradmem(kind, **options), make_batch().context
    queries, rows = [[3, 1, 4, 1, 5], [9], [2, 6], [9]], [2, 0, 0, 1]
    memory = method.write(context).memory
    got = method.generate(memory, queries, torch.tensor(rows), max_new_tokens=5, do_sample=False)
    for query, row, answer in zip(queries, rows, got, strict=True):
        own = {name: tensor[row] for name, tensor in memory.tensors.items()}
        ids = list(query)
        for _ in range(5):
            ids.append(int(naive(method, **options).read(own, torch.tensor(ids))[-1].argmax()))
        assert answer == ids[len(query) :]
    assert len(set(map(tuple, got))) > 2, "the test should see different answers"


def test_additions_start_neutral() -> None:
    """A projection starts as the identity, and a copied head as the LM head, but untied from it."""
    method = GradMem(
        make_gradmem().backbone,
        n_mem=2,
        projection="proj",
        write_head="copy",
        learn_inner_lr=True,
        inner_lr=0.2,
    )
    memory = torch.randn(2, 16, dtype=torch.float64)
    assert torch.equal(method.proj(memory), memory)
    assert torch.equal(method.write_head.weight, method.backbone.head.weight)
    with torch.no_grad():
        method.write_head.weight.zero_()
    assert method.backbone.head.weight.any()
    assert method.log_inner_lr.exp().flatten().tolist() == pytest.approx([0.2, 0.2])


def test_a_random_write_head_is_no_copy() -> None:
    torch.manual_seed(0)
    method = GradMem(make_gradmem().backbone, n_mem=2, write_head="random")
    drawn, copied = method.write_head.weight.flatten(), method.backbone.head.weight.flatten()
    assert torch.corrcoef(torch.stack([drawn, copied]))[0, 1].abs() < 0.2
    assert 0.8 < drawn.std() / copied.std() < 1.2


@pytest.mark.parametrize(
    "options",
    [
        {"n_mem": 0},
        {"write_steps": -1},
        {"n_mem": 2.0},
        {"n_mem": True},
        {"write_steps": None},
        {"inner_lr": 0.0},
        {"inner_lr": "1e-3"},
        {"inner_lr": float("nan")},
        {"inner_lr": 1e-60},
        {"learn_inner_lr": 1},
        {"clip_value": 1e300},
        {"clip_norm": 0.0},
        {"extra_step_decay": float("inf")},
        {"extra_step_decay": -1.0},
        {"gauss_newton_after": -1},
        {"inner_optimizer": "adamw"},
        {"learn_momentum": True},
        {"learn_momentum": True, "learn_inner_lr": True, "inner_optimizer": "adam"},
        {"learn_momentum": True, "learn_inner_lr": True, "write_steps": 0},
        {"order": "third"},
        {"last_k": -1},
        {"n_ctrl": -1},
        {"projection": "linear"},
        {"write_head": "tied"},
        {"write_lora": -1},
        {"read_lora": -1},
    ],
    ids=str,
)
def test_bad_options_are_refused(options: dict) -> None:
    with pytest.raises(GradmemError, match=next(iter(options))):
        make_gradmem(**options)


def test_negative_steps_are_refused() -> None:
    with pytest.raises(GradmemError, match="steps"):
        make_gradmem().write(make_batch().context, -1)
