"""Training: what it learns, resuming, divergence; `tests/system` kills it and gives it two processes."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import gradmem
from gradmem import GradmemError
from gradmem.cli.training import train
from gradmem.model import MemoryModel
from gradmem.tasks.kv import KV
from gradmem.training import Stage
from gradmem.training import trainer as loop
from gradmem.training.optimizers import build_optimizers
from gradmem.training.state import states
from gradmem.training.step import MetaStep
from helpers import make_batch, random_tokens
from recipes import BACKBONE, METHOD, TASK, log, recipe, same


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "checkpoint" / "model.safetensors")


def test_log_and_checkpoint(tmp_path: Path) -> None:
    train(recipe(14), tmp_path / "run")
    rows = log(tmp_path / "run")
    assert [int(row["step"]) for row in rows] == list(range(1, 15))
    assert {row["stage"] for row in rows} == {"0", "1"}
    assert {row["write_steps"] for row in rows[:7]} == {"1"}
    assert {row["write_steps"] for row in rows[7:]} == {"1", "2"}
    assert [float(row["lr_scale"]) for row in rows[:3]] == [0.5, 1, 1]
    assert [float(row["lr_scale"]) for row in rows[-3:]] == pytest.approx([1, 2 / 3, 1 / 3], abs=1e-5)
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    assert gradmem.load(tmp_path / "run" / "checkpoint").write("a:b").ask("a") is not None


def test_interrupted_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    train(recipe(), tmp_path / "whole")
    from gradmem.training.trainer import Trainer

    class Stop(Exception):
        pass

    for stop_at in (4, 7, 10):
        trainer = Trainer(recipe(), tmp_path / "cut")
        step = trainer._step

        def interrupted(*given: object, step=step, trainer=trainer, stop_at=stop_at) -> dict:
            if trainer.state.step == stop_at:
                raise Stop
            return step(*given)

        trainer._step = interrupted
        with pytest.raises(Stop):
            trainer.run()
    train(recipe(), tmp_path / "cut")
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    assert [int(row["step"]) for row in log(tmp_path / "cut")] == list(range(1, 13))


def test_bf16_trains_as_fp32_does(tmp_path: Path) -> None:
    """The first loss agrees to the precision of bf16; also, one process may train in both."""
    losses = []
    for precision in ("fp32", "bf16"):
        train(recipe(2, precision=precision), tmp_path / precision)
        losses.append(float(log(tmp_path / precision)[0]["loss"]))
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_divergence_stops_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    calm = Stage(max_steps=4, write_steps=[1], batch_size=4)
    wild = Stage(max_steps=40, write_steps=[1], batch_size=4, lr_scale=1e38)
    with pytest.raises(GradmemError, match="diverged at step"):
        train(recipe(stages=[calm, wild]), tmp_path / "run")
    (state,) = states(tmp_path / "run" / "states")
    assert all(torch.isfinite(tensor).all() for tensor in load_file(state / "weights.safetensors").values())
    train(recipe(stages=[calm]), tmp_path / "calm")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "calm"))


def test_micro_batches_add_up_to_the_batch(tmp_path: Path) -> None:
    whole = recipe(4, optimizer="adamw", write_loss_weight=0.3, task={**TASK, "queries": 2})
    train(whole, tmp_path / "whole")
    train(dataclasses.replace(whole, micro_batch_size=3), tmp_path / "parts")
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for name in one:
        assert torch.allclose(one[name], two[name], atol=2e-5), name
    for a, b in zip(log(tmp_path / "whole"), log(tmp_path / "parts"), strict=True):
        for name in ("loss", "write_loss", "exact_match", "grad_norm"):
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-3), name


def test_a_stage_may_weigh_the_write_loss_itself(tmp_path: Path) -> None:
    def trained(name: str, weight: float, of_stages: list[float | None]) -> dict[str, torch.Tensor]:
        some = recipe(8, optimizer="adamw", write_loss_weight=weight)
        stages = zip(some.stages, of_stages, strict=True)
        some.stages = [dataclasses.replace(stage, write_loss_weight=own) for stage, own in stages]
        train(some, tmp_path / name)
        return weights(tmp_path / name)

    first = trained("first", 0.0, [0.5, None])
    assert same(first, trained("last", 0.5, [None, 0.0]))
    assert not same(first, trained("never", 0.0, [None, None]))
    assert not same(first, trained("always", 0.5, [None, None]))


def test_a_write_loss_without_weight_takes_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    method = MemoryModel.from_spec(TASK, BACKBONE, {**METHOD, "reconstruction": True}).method
    passes = []
    whole = type(method).token_losses
    monkeypatch.setattr(type(method), "token_losses", lambda *given: passes.append(1) or whole(*given))
    batch = make_batch()
    scored = KV(2, 1, 1, alphabet=8).scored(batch.labels)
    for reconstruct, count in ((True, 1), (False, 0)):
        passes.clear()
        write_loss = MetaStep(method)(batch, 1, scored, reconstruct)[1].detach()
        assert len(passes) == count
        assert (float(write_loss) > 0) == reconstruct


def test_a_batch_splits_into_contexts_with_their_queries() -> None:
    batch = make_batch()
    batch.rows = torch.tensor([2, 0, 0, 3, 2])
    batch.context = random_tokens([7, 5, 8, 6, 4])
    parts = list(batch.split(2))
    assert [part.context.lengths.tolist() for part in parts] == [[7, 5], [8, 6]]  # the last has no query
    assert [part.rows.tolist() for part in parts] == [[0, 0], [0, 1, 0]]
    for part, chosen in zip(parts, ([1, 2], [0, 3, 4]), strict=True):
        assert torch.equal(part.queries.ids, batch.queries.ids[chosen])
        assert torch.equal(part.labels, batch.labels[chosen])


def test_until_ends_a_stage(tmp_path: Path) -> None:
    easy = {**TASK, "pairs": 1, "alphabet": 2}
    stage = Stage(max_steps=300, write_steps=[1], batch_size=32, until_exact_match=0.3, warmup_steps=1)
    train(recipe(task=easy, stages=[stage]), tmp_path / "run")
    rows = log(tmp_path / "run")
    means = [sum(float(row["exact_match"]) for row in rows[i : i + 10]) / 10 for i in range(len(rows) - 9)]
    assert means[-1] >= 0.3 or len(rows) == 300
    assert all(mean < 0.3 for mean in means[:-1])
    assert len(rows) < 300


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [0, 4])
def test_a_run_that_is_told_to_stop_saves_a_state(
    signal_: signal.Signals, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the states of every third step, also before the first; then it goes on as if nothing had been."""
    train(recipe(), tmp_path / "whole")
    step, before = loop.Trainer._step, signal.getsignal(signal_)

    def told(self: loop.Trainer, *given: object) -> dict:
        if self.state.step == at:
            signal.raise_signal(signal_)
        return step(self, *given)

    monkeypatch.setattr(loop.Trainer, "_step", told)
    with pytest.raises(KeyboardInterrupt, match=f"continues from .*step-0*{at + 1}$"):
        train(recipe(), tmp_path / "cut")
    monkeypatch.setattr(loop.Trainer, "_step", step)
    assert signal.getsignal(signal_) is before
    assert len(log(tmp_path / "cut")) == at + 1
    assert not (tmp_path / "cut" / "checkpoint").exists()
    for _ in range(2):  # with no time left, the stopped stage still gets its checkpoint and validation, once
        train(recipe(max_minutes=1e-6), tmp_path / "cut")
        assert len(log(tmp_path / "cut")) == at + 1
        assert (tmp_path / "cut" / "checkpoint").is_dir()
        assert len((tmp_path / "cut" / "valid.csv").read_text().splitlines()) == 2
    train(recipe(), tmp_path / "cut")
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


def test_where_no_state_is_none_is_promised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the second Ctrl-C comes before the first step is over."""

    def twice(self: loop.Trainer, *given: object) -> dict:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("went on")

    monkeypatch.setattr(loop.Trainer, "_step", twice)
    with pytest.raises(KeyboardInterrupt, match="there is no state"):
        train(recipe(), tmp_path)


def test_minutes_are_those_of_a_clock_on_the_wall() -> None:
    """Which goes on while the processor has nothing to do."""
    wall, processor = loop.clock(), time.process_time()
    time.sleep(0.2)
    wall, processor = loop.clock() - wall, time.process_time() - processor
    assert wall >= 0.2 > processor


def test_a_run_ends_when_its_minutes_are_over(tmp_path: Path) -> None:
    for _ in range(2):  # the second time there is nothing left to do
        train(recipe(12, max_minutes=1e-6), tmp_path)
        assert len(log(tmp_path)) <= 1
        assert (tmp_path / "checkpoint").is_dir()
    train(recipe(12), tmp_path)  # with more time it goes on in the same stage
    assert len(log(tmp_path)) == 12


def test_learning_rates_cool_down_before_the_minutes_are_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step takes six seconds of a run of two minutes: 20 steps, of which the last three cool down."""
    ticks = itertools.count(0, 6)
    monkeypatch.setattr("gradmem.training.trainer.clock", lambda: next(ticks))
    train(recipe(100, max_minutes=2, strategy="unroll", micro_batch_size=4), tmp_path)
    rates = [float(row["lr_scale"]) for row in log(tmp_path)]
    assert rates[2:18] == [1.0] * 16
    assert rates[18:] == pytest.approx([2 / 3, 1 / 3])


def test_a_run_is_validated_on_the_way_and_learns_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six seconds a step: every half minute after five steps. A run that is cut and resumed has the same curve."""

    def run(name: str, **changes: object) -> list[dict[str, str]]:
        ticks = itertools.count(0, 6)
        monkeypatch.setattr("gradmem.training.trainer.clock", lambda: next(ticks))
        train(recipe(**({"steps": 24, "valid_samples": 4} | changes)), tmp_path / name)
        with (tmp_path / name / "valid.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    plain, rows = run("plain"), run("validated", valid_minutes=0.5)
    # The second stage, which begins after step 12, reads after one step and after two.
    assert [(int(row["step"]), row["write_steps"]) for row in plain] == [(12, "1"), (24, "1"), (24, "2")]
    steps = [5, 10, 12, 15, 15, 20, 20, 24, 24]
    assert [int(row["step"]) for row in rows] == steps
    assert [float(row["seconds"]) for row in rows] == [6.0 * step for step in steps]
    assert [row for row in rows if row["step"] in ("12", "24")] == plain
    assert all(float(row["low"]) <= float(row["exact_match"]) <= float(row["high"]) for row in rows)
    assert same(weights(tmp_path / "validated"), weights(tmp_path / "plain"))
    run("cut", valid_minutes=0.5, max_minutes=6 * 16 / 60, cooldown=1e-9)
    assert run("cut", valid_minutes=0.5)[-4:] == rows[-4:]
    with pytest.raises(GradmemError, match="valid_minutes must be above 0"):
        recipe(valid_minutes=0.0)


def test_one_process_keeps_the_time_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a main process that counts a minute a step, another cools down and ends with it, by the same clock."""
    minutes = itertools.count(1)
    monkeypatch.setattr("gradmem.training.trainer.broadcast_object_list", lambda mine: [60.0 * next(minutes)])
    train(recipe(100, max_minutes=20, strategy="unroll", micro_batch_size=4), tmp_path)
    rows = log(tmp_path)
    assert [float(row["seconds"]) for row in rows] == [60.0 * minute for minute in range(1, 21)]
    assert [float(row["lr_scale"]) for row in rows[-2:]] == pytest.approx([2 / 3, 1 / 3])


def test_tasks_of_a_stage_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both tasks are seen; the checkpoint keeps the first."""
    seen = []
    monkeypatch.setattr(
        KV, "batch", lambda self, *a, batch=KV.batch: seen.append((self.pairs, a[0])) or batch(self, *a)
    )
    train(recipe(stages=[Stage(max_steps=12, write_steps=[1], tasks=[{"pairs": 3}, {}])]), tmp_path / "run")
    assert {pairs for pairs, split in seen if split == "train"} == {2, 3}
    assert gradmem.load(tmp_path / "run" / "checkpoint").spec["task"]["pairs"] == 3


def test_inner_rates_and_momentum_learn_at_a_rate_of_their_own() -> None:
    """The first step of AdamW moves every parameter with a gradient by its learning rate."""
    method = {**METHOD, "write_steps": 2, "learn_inner_lr": True, "learn_momentum": True}
    model = MemoryModel.from_spec(TASK, BACKBONE, method)
    before = {name: parameter.detach().clone() for name, parameter in model.method.named_parameters()}
    optimizers = build_optimizers(model.method, recipe(optimizer="adamw", adamw_lr=1e-4, inner_adamw_lr=0.05))
    batch = model.task.batch("train", 0, 4)
    model.method.write(batch.context).memory.tensors["memory"].square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    moved = {name: (p - before[name]).abs().max().item() for name, p in model.method.named_parameters()}
    assert moved["log_inner_lr"] == pytest.approx(0.05, rel=1e-3)
    assert moved["momentum"] == pytest.approx(0.05, rel=1e-3)
    assert moved["initial_memory"] == pytest.approx(1e-4, rel=1e-3)


def test_frozen_model_has_nothing_to_train() -> None:
    model = MemoryModel.from_spec(TASK, BACKBONE, METHOD)
    model.method.requires_grad_(False)
    assert build_optimizers(model.method, recipe()) == []


def test_a_trainer_without_report_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    loop.Trainer(recipe(2), tmp_path).run()
    assert capfd.readouterr() == ("", "")
