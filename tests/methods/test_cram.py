"""Cramming: exact reproduction, per-sample stops, and what the inner loop spends."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gradmem import GradmemError
from gradmem.methods import Cram, GradMem
from helpers import distance, make_method, random_tokens

STEPS = 60
WIDE = {"hidden_size": 64}


def cram(**options: Any) -> Cram:
    return make_method(Cram, "llama", **{"n_mem": 4, "inner_lr": 0.3, "write_steps": STEPS} | options)


def test_equals_adam_of_torch() -> None:
    """On the loss of the published formulation: the last vector predicts the first token."""
    method, context = cram(n_mem=3, inner_lr=0.1), random_tokens([7])
    memory = method.initial_memory.detach()[None].clone().requires_grad_()
    optimizer = torch.optim.Adam([memory], lr=0.1)
    for _ in range(5):
        embeds = torch.cat([memory, method.backbone.embed(context.ids)], dim=1)
        logits = method.backbone.model(inputs_embeds=embeds).logits[0, 2:-1]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, context.ids[0]).backward()
        optimizer.step()
    assert distance(method.write(context, 5).memory.tensors["memory"], memory) < 1e-6


def test_reproduces_a_text() -> None:
    method, context = cram(config=WIDE, inner_lr=0.1), random_tokens([6])
    written = method.write(context, 200, until=0.1)
    assert 0 < int(written.taken) < 200
    losses = method.token_losses(written.memory, context)
    assert float(losses.mean()) <= 0.1
    prefix = written.memory.tensors["memory"]
    logits = method.backbone.model(inputs_embeds=torch.cat([prefix, method.backbone.embed(context.ids)], 1)).logits
    assert logits[:, 3:-1].argmax(-1).tolist() == context.ids.tolist()


def test_each_sample_stops_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """And costs nothing from then on."""
    method, context, until = cram(), random_tokens([2, 6, 4]), 1.2
    alone = [method.write(context[row : row + 1], until=until) for row in range(3)]
    rows: list[int] = []
    hidden = method.backbone.hidden
    monkeypatch.setattr(method.backbone, "hidden", lambda embeds: rows.append(len(embeds)) or hidden(embeds))
    together = method.write(context, until=until)
    assert together.taken.tolist() == [int(one.taken) for one in alone]
    assert len(set(together.taken.tolist())) == 3, "the test should see different stops"
    # Every step and the loss that ends it; a sample that has stopped is not run again.
    assert sum(rows) == sum(min(taken + 1, STEPS) for taken in together.taken.tolist())
    for row, one in enumerate(alone):
        assert distance(together.memory.tensors["memory"][row], one.memory.tensors["memory"][0]) < 1e-6
        assert distance(together.losses[: int(one.taken), row], one.losses[:, 0]) < 1e-6


@pytest.mark.parametrize("start", ["random", "mean"])
def test_start(start: str) -> None:
    """Whatever was drawn before, a seed gives one start; other seeds another."""
    options = {"n_mem": 3, "start": start}
    torch.manual_seed(1)
    one, two, other = (Cram(cram().backbone, **options, seed=seed).initial_memory for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert torch.equal(one, other) == (start == "mean")
    table = cram().backbone.model.get_input_embeddings().weight
    wanted = torch.stack([table.mean(0)] * 3)
    assert (distance(one, wanted) < 1e-6) == (start == "mean")


def test_drawing_the_start_leaves_other_draws_alone() -> None:
    backbone = cram().backbone
    torch.manual_seed(1)
    wanted = torch.rand(1)
    torch.manual_seed(1)
    Cram(backbone)
    assert torch.equal(torch.rand(1), wanted)


def test_nothing_is_trained_and_no_graph_is_kept() -> None:
    method = cram()
    assert not any(parameter.requires_grad for parameter in method.parameters())
    written = method.write(random_tokens([5]), 3)
    assert written.losses.grad_fn is None
    assert written.memory.tensors["memory"].grad_fn is None


def test_until_is_the_same_with_gradients() -> None:
    """Where samples that have stopped are run on, for the graph."""
    method = make_method(GradMem, "llama", n_mem=3, inner_lr=0.3)
    context = random_tokens([3, 8, 5])
    losses = method.write(context, 4).losses.detach()
    until = float(losses[1:3].mean())
    kept = method.write(context, 4, until=until)
    with torch.no_grad():
        dropped = method.write(context, 4, until=until)
    assert kept.taken.tolist() == dropped.taken.tolist()
    assert len(set(kept.taken.tolist())) > 1, "the test should see different stops"
    assert distance(dropped.memory.tensors["memory"], kept.memory.tensors["memory"]) < 1e-10
    assert distance(dropped.losses, kept.losses) < 1e-10


def test_bad_start() -> None:
    with pytest.raises(GradmemError, match="random or mean"):
        cram(start="zeros")


def test_asking_warns_and_reciting_does_not(recwarn: pytest.WarningsRecorder) -> None:
    method, context = cram(), random_tokens([5])
    memory = method.write(context, 2).memory
    method.reconstruct(memory, [5])
    assert not [one for one in recwarn if one.category is UserWarning]
    with pytest.warns(UserWarning, match="recites its text and does not answer questions"):
        method.generate(memory, [[1, 2]], max_new_tokens=2, do_sample=False)
