"""States of a run, and warm starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import gradmem
from gradmem import GradmemError
from gradmem.cli.training import train
from gradmem.model import MemoryModel
from gradmem.training.optimizers import build_optimizers
from gradmem.training.state import load_state, save_state, states, take_weights
from helpers import make_batch
from recipes import BACKBONE, METHOD, TASK, recipe, same


def test_state_round_trip_includes_the_optimizers(tmp_path: Path) -> None:
    def build() -> tuple[MemoryModel, list[torch.optim.Optimizer]]:
        torch.manual_seed(1)
        model = MemoryModel.from_spec(TASK, BACKBONE, METHOD)
        return model, build_optimizers(model.method, recipe())

    def step(model: MemoryModel, optimizers: list[torch.optim.Optimizer]) -> None:
        batch = model.task.batch("train", 0, 4)
        model.method.write(batch.context).losses.sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    model, optimizers = build()
    assert {type(optimizer).__name__ for optimizer in optimizers} == {"Muon", "AdamW"}
    step(model, optimizers)
    save_state(tmp_path, 1, model.method, optimizers, {"note": 7})
    step(model, optimizers)
    again, their_optimizers = build()
    assert load_state(states(tmp_path)[-1], again.method, their_optimizers) == {"note": 7}
    step(again, their_optimizers)
    assert same(model.method.state_dict(), again.method.state_dict())


def test_half_written_state_is_not_taken_for_one(tmp_path: Path) -> None:
    model = MemoryModel.from_spec(TASK, BACKBONE, METHOD)
    save_state(tmp_path, 3, model.method, [], {})
    (tmp_path / ".0123456789abcdef.tmp").mkdir()
    (tmp_path / ".0123456789abcdef.tmp" / "weights.safetensors").write_bytes(b"half")
    assert [path.name for path in states(tmp_path)] == ["step-00000003"]
    save_state(tmp_path, 6, model.method, [], {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000006"]


def test_a_state_of_another_version_is_refused(tmp_path: Path) -> None:
    train(recipe(4), tmp_path / "run")
    (state,) = states(tmp_path / "run" / "states")
    progress = json.loads((state / "progress.json").read_text())
    progress["micro_batch"] = progress.pop("micro_batch_size")
    (state / "progress.json").write_text(json.dumps(progress))
    with pytest.raises(GradmemError, match=r"cannot resume from .*another version.*--output"):
        train(recipe(4), tmp_path / "run")


def test_warm_start_takes_over_equal_weights(tmp_path: Path) -> None:
    train(recipe(), tmp_path / "one")
    one = gradmem.load(tmp_path / "one" / "checkpoint")
    model = MemoryModel.from_spec(TASK, BACKBONE, {**METHOD, "n_mem": 5})
    kept = take_weights(model.method, one.method)
    assert kept == ["initial_memory", "log_inner_lr"]
    mine, theirs = model.method.state_dict(), one.method.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine if name not in kept)


@pytest.mark.parametrize("memory", ["vectors", "keys_values"])
@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize(("own", "steps"), [(2, 2), (5, 5), (5, 4)])
def test_warm_start_for_other_steps_writes_as_before(memory: str, momentum: bool, own: int, steps: int) -> None:
    """Rates and momentum of the first steps are taken, and those of further ones as they fall after the last."""
    method = {**METHOD, "memory": memory, "extra_step_decay": 0.3}
    mine = MemoryModel.from_spec(TASK, BACKBONE, {**method, "learn_momentum": True, "write_steps": own})
    theirs = MemoryModel.from_spec(TASK, BACKBONE, {**method, "learn_momentum": momentum, "write_steps": 3})
    with torch.no_grad():
        for weight in theirs.method.inner_parameters():
            weight.normal_(0, 0.1)
    assert take_weights(mine.method, theirs.method) == []
    context = make_batch().context
    with torch.no_grad():
        one, other = (some.method.write(context, steps).memory.tensors for some in (mine, theirs))
    rounding = 0 if steps < 4 else 1e-6  # first steps have the same numbers, further ones the logarithm of a product
    assert all(torch.allclose(one[name], other[name], rtol=0, atol=rounding) for name in other)


def test_warm_start_takes_over_weights_of_layers_that_have_adapters_now(tmp_path: Path) -> None:
    train(recipe(), tmp_path / "one")
    one = gradmem.load(tmp_path / "one" / "checkpoint")
    model = MemoryModel.from_spec(TASK, BACKBONE, {**METHOD, "write_lora": 2})
    kept = take_weights(model.method, one.method)
    assert kept
    assert all("lora_" in name for name in kept)
    batch = make_batch()
    with torch.no_grad():
        mine, theirs = (some.method.write(batch.context, 2).memory.tensors["memory"] for some in (model, one))
    assert torch.allclose(mine, theirs, atol=1e-6)  # new adapters add nothing
    back = MemoryModel.from_spec(TASK, BACKBONE, METHOD)
    assert take_weights(back.method, model.method) == []


def test_warm_start_says_what_is_new(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(recipe(), tmp_path / "one")
    start = str(tmp_path / "one" / "checkpoint")
    train(recipe(init_from=start), tmp_path / "same")
    assert "so new" not in capsys.readouterr().err
    train(recipe(init_from=start, method={**METHOD, "n_mem": 5}), tmp_path / "two")
    assert "so new: initial_memory, log_inner_lr" in " ".join(capsys.readouterr().err.split())


def test_training_from_weights_that_are_not_there_says_which(tmp_path: Path) -> None:
    with pytest.raises(GradmemError, match=r"init_from: runs/other/checkpoint.*train that first"):
        train(recipe(init_from="runs/other/checkpoint"), tmp_path / "run")
