"""RMT against a naive reference in float64: one padded batch, masks and position ids, plain calls of transformers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gradmem.batch import Batch, Tokens
from gradmem.errors import GradmemError
from gradmem.methods import RMT
from gradmem.training.step import MetaStep
from helpers import (
    KINDS,
    TOLERANCE,
    VOCABULARY,
    assert_same_gradients,
    distance,
    gradients,
    make_batch,
    make_later_batch,
    make_method,
    random_tokens,
    real,
)
from naive_rmt import naive_read, naive_write

OPTIONS = [
    dict(zip(("projection", "n_ctrl", "residual", "write_head", "reconstruction", "write_steps"), values, strict=True))
    for values in itertools.product(
        ("none", "proj", "proj_rw"), (0, 2), (False, True), ("none", "random"), (False, True), (1, 3)
    )
]
EVERYTHING = OPTIONS[-1]
WEIGHT = 0.7


def make_rmt(kind: str = "gpt2", **options: Any) -> RMT:
    return make_method(RMT, kind, **{"n_mem": 3, "write_steps": 2} | options)


# --- The naive reference ----------------------------------------------------------------------------------


def naive_loss(method: RMT, options: dict[str, Any], batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Outer loss, memory and logits."""
    memory, reconstruction = naive_write(method, options, batch.context)
    logits = naive_read(method, options, memory[batch.rows], batch.queries)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
    return loss + WEIGHT * reconstruction, memory, logits


def check_against_naive(kind: str, options: dict[str, Any]) -> None:
    options = {"n_mem": 3, **options}
    method, data = make_rmt(kind, **options), make_later_batch()
    written = method.write(data.context)
    logits = method.read(written.memory, data.queries, data.rows)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), data.labels.flatten())
    loss = loss + WEIGHT * method.write_loss(written, data.context)
    wanted_loss, wanted_memory, wanted_logits = naive_loss(method, options, data)
    assert distance(written.memory.tensors["memory"], wanted_memory) < TOLERANCE
    assert distance(logits[:, 1:][data.queries.mask], wanted_logits[data.queries.mask]) < TOLERANCE
    assert loss.item() == pytest.approx(wanted_loss.item(), rel=TOLERANCE)
    assert_same_gradients(gradients(loss, method), gradients(wanted_loss, method))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_equals_naive(kind: str, options: dict[str, Any]) -> None:
    """Memory, logits, loss and all gradients, with contexts and queries of different lengths."""
    check_against_naive(kind, options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [EVERYTHING, EVERYTHING | {"n_mem": 1, "n_ctrl": 0}], ids=["all", "one_vector"])
def test_every_backbone_equals_naive(kind: str, options: dict[str, Any]) -> None:
    check_against_naive(kind, options)


# --- Starts, batches, passes ------------------------------------------------------------------------------


def test_starts_as_published() -> None:
    """The projection of WRITE starts as PyTorch's, that of READ as the identity, the residual norm as no change."""
    torch.manual_seed(0)
    backbone = make_rmt().backbone
    method = RMT(backbone, n_mem=2, projection="proj_rw", residual=True, write_head="copy")
    d = backbone.width
    assert torch.equal(method.read_proj.weight, torch.eye(d, dtype=torch.float64))
    assert not method.read_proj.bias.any()
    assert 0 < method.proj.weight.abs().max() <= d**-0.5
    assert method.proj.bias.any()
    assert torch.equal(method.write_head.weight, backbone.head.weight)
    assert RMT(backbone, projection="proj").read_proj is None


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_order_and_pads_change_nothing(kind: str) -> None:
    method, context = make_rmt(kind, **EVERYTHING), random_tokens([7, 4, 9, 1])
    written = method.write(context)
    together = written.memory.tensors["memory"]
    assert min(distance(together[i], together[j]) for i in range(4) for j in range(i)) > 1e-3
    shuffled = torch.tensor([2, 0, 3, 1])
    again = method.write(context[shuffled])
    assert distance(again.memory.tensors["memory"], together[shuffled]) < TOLERANCE
    for row in range(4):
        ids = real(context, row)[None]
        alone = method.write(Tokens(ids, torch.ones_like(ids, dtype=torch.bool)))
        assert distance(together[row], alone.memory.tensors["memory"][0]) < TOLERANCE
        assert distance(written.losses[:, row], alone.losses[:, 0]) < TOLERANCE


@pytest.mark.parametrize("residual", [False, True])
def test_the_number_of_passes_is_an_argument(residual: bool) -> None:
    context = make_batch().context
    method = make_rmt(write_steps=5, residual=residual)
    states = list(method.trajectory(context, 3))
    assert [state.taken.tolist() for state in states] == [[steps] * 3 for steps in range(4)]
    assert torch.equal(states[0].memory.tensors["memory"][1], method.initial_memory)
    for steps, state in enumerate(states):
        other = make_rmt(write_steps=steps, residual=residual).write(context)
        assert torch.equal(state.memory.tensors["memory"], other.memory.tensors["memory"])
        assert state.losses.shape == (0, 3)
    assert method.write(context).taken.tolist() == [5] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_longest_context_fits(kind: str) -> None:
    method = make_rmt(kind, n_ctrl=2)
    assert method.max_context == 40 - (3 + 4) - (2 + 3)
    assert method.max_query == 40 - (3 + 4)
    memory = method.write(random_tokens([method.max_context])).memory
    assert memory.tensors["memory"].isfinite().all()
    assert method.read(memory, random_tokens([method.max_query])).isfinite().all()
    with pytest.raises(GradmemError, match="limit is 28"):
        method.write(random_tokens([29]))


# --- The write loss ---------------------------------------------------------------------------------------


def test_losses_are_of_the_memory_before_each_pass() -> None:
    """So that receipts read as those of other methods: each loss belongs to the memory of the pass before."""
    method, context = make_rmt(**EVERYTHING), make_batch().context
    states = list(method.trajectory(context, 3))
    for step, loss in enumerate(states[-1].losses):
        tokens = method.token_losses(states[step].memory, context)
        assert not tokens[~context.mask].any()
        assert distance(loss, tokens.sum(1) / context.lengths) < TOLERANCE


def test_without_reconstruction_there_is_no_write_loss() -> None:
    method, context = make_rmt(), make_batch().context
    assert method.write_loss(method.write(context), context) == 0
    with pytest.raises(GradmemError, match=r"until.*write loss"):
        method.write(context, until=1.0)
    unread = make_rmt(reconstruction=True)
    assert unread.write_loss(unread.write(context, 0), context) == 0


def test_until_stops_samples_one_by_one() -> None:
    method, context = make_rmt(**EVERYTHING), make_batch().context
    states = list(method.trajectory(context, 6))
    until = states[-1].losses[2].median().item()
    written = method.write(context, 6, until=until)
    for row in range(3):
        losses = [*states[-1].losses[:, row].tolist(), float("-inf")]
        steps = next(k for k, loss in enumerate(losses) if loss <= until)
        assert written.taken[row] == min(steps, 6)
        wanted = states[written.taken[row]].memory.tensors["memory"][row]
        assert distance(written.memory.tensors["memory"][row], wanted) < TOLERANCE
    assert len(set(written.taken.tolist())) > 1


# --- Read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_generate_is_greedy_reading(kind: str) -> None:
    """Queries of different lengths, several for one memory, against step-by-step argmax without a cache."""
    options = {"n_mem": 3, **EVERYTHING}
    method, context = make_rmt(kind, **options), make_batch().context
    queries, rows = [[3, 1, 4, 1, 5], [9], [2, 6], [9]], [2, 0, 0, 1]
    memory = method.write(context).memory
    got = method.generate(memory, queries, torch.tensor(rows), max_new_tokens=5, do_sample=False)
    for query, row, answer in zip(queries, rows, got, strict=True):
        ids = list(query)
        for _ in range(5):
            tokens = Tokens.from_lists([ids])
            ids.append(int(naive_read(method, options, memory.tensors["memory"][row][None], tokens)[0, -1].argmax()))
        assert answer == ids[len(query) :]
    assert all(0 <= token < VOCABULARY for answer in got for token in answer)


@pytest.mark.parametrize("options", [{"n_mem": 0}, {"projection": "per_sample"}, {"write_head": "tied"}], ids=str)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(GradmemError, match=next(iter(options))):
        make_rmt(**options)


@pytest.mark.parametrize("config", [{}, {"attn_pdrop": 1e-9}])
def test_training_in_bfloat16_has_about_the_gradient_of_float32(config: dict[str, Any]) -> None:
    """With the attention that is fast for it, and with PyTorch's where that drops."""
    method, batch = make_method(RMT, config=config, n_mem=3).float(), make_batch()
    found = []
    for precision in ("bf16", "fp32"):
        loss, *_ = MetaStep(method.train(), precision)(batch, 1, batch.labels != -100)
        found.append(torch.cat([grad.flatten() for grad in gradients(loss, method).values()]))
    low, exact = found
    assert low.isfinite().all()
    assert 0 < distance(low, exact) < 0.1
