"""How a training step is chosen: by what is measured, within what is free."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from gradmem import GradmemError
from gradmem.cli.main import main
from gradmem.cli.training import plan_table, train
from gradmem.model import MemoryModel
from gradmem.model.build import build_task
from gradmem.ops.workspace import elements_at_once
from gradmem.training import plan
from gradmem.training import precision as precision_module
from gradmem.training import trainer as loop
from gradmem.training.device_memory import free_memory
from gradmem.training.plan import Plan, Trial, make_plan, plan_stage
from gradmem.training.precision import choose_precision
from gradmem.training.recipe import Precision
from gradmem.training.state import states
from gradmem.training.step import MetaStep, outer_loss
from recipes import TASK, log, recipe

CPU = torch.device("cpu")
GB = 10**9


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine with 10 GB to use, where a context takes 1 GB (unroll: 4, compile: 2) and a second (0.8, 0.4)."""
    seconds = {"unroll": 0.8, "recompute": 1.0, "compile": 0.4}
    about: dict[str, Any] = {"free": 10 * GB / plan.SHARE, "seconds": seconds, "tried": []}
    size = {"unroll": 4 * GB, "recompute": GB, "compile": 2 * GB}

    def measure(run: Any, strategy: Any, contexts: int, of: int, device: torch.device) -> Trial:
        about["tried"].append((strategy, contexts))
        return Trial(strategy, contexts, about["seconds"][strategy] * of, size[strategy] * contexts)

    monkeypatch.setattr(plan, "_measure", measure)
    monkeypatch.setattr(plan, "free_memory", lambda device: about["free"])
    return about


def choose(contexts: int = 8, tokens: int = 100, **options: Any) -> tuple[str, int]:
    chosen = make_plan(lambda strategy, size: None, contexts, tokens, CPU, **options).chosen
    return chosen.strategy, chosen.micro_batch_size


def test_the_fastest_that_fits(machine: dict[str, Any]) -> None:
    assert choose()[0] == "unroll"
    assert max(size for strategy, size in machine["tried"] if strategy == "unroll") == 2
    assert max(size for strategy, size in machine["tried"] if strategy == "recompute") == 8
    machine["free"] = 3 * GB / plan.SHARE
    machine["tried"].clear()
    assert choose()[0] == "recompute"
    assert max(machine["tried"]) == ("unroll", 1)  # to see what it takes
    assert max(size for _, size in machine["tried"]) == 3
    assert choose(processes=3) == ("recompute", 1)
    machine["free"] = 10 * GB / plan.SHARE
    machine["seconds"]["unroll"] = 0.97
    assert choose()[0] == "recompute"  # not worth the memory


def test_compiling_is_never_chosen_for_the_user_and_tries_few_sizes(machine: dict[str, Any]) -> None:
    choose()
    assert "compile" not in {strategy for strategy, _ in machine["tried"]}
    machine["tried"].clear()
    assert choose(strategies=["compile"]) == ("compile", 4)
    assert machine["tried"] == [("compile", 1), ("compile", 4)]


def test_no_larger_parts_than_speed_needs(machine: dict[str, Any]) -> None:
    machine["free"] = 1000 * GB
    choose(contexts=64, tokens=plan.MICRO_TOKENS // 4)
    assert max(size for _, size in machine["tried"]) == 4
    machine["tried"].clear()
    choose(contexts=64, tokens=10 * plan.MICRO_TOKENS)
    assert max(size for _, size in machine["tried"]) == 1


def test_what_the_recipe_settles_is_kept(machine: dict[str, Any]) -> None:
    assert choose(strategies=["recompute"])[0] == "recompute"
    assert choose(micro_batch_size=2) == ("unroll", 2)
    assert choose(micro_batch_size=5) == ("recompute", 5)


def test_what_does_not_fit_is_refused_with_advice(machine: dict[str, Any]) -> None:
    with pytest.raises(
        GradmemError, match=r"20 contexts of 100 tokens.*20\.00 GB.*10\.00 GB.*`micro_batch_size: 10` fits"
    ):
        choose(contexts=40, micro_batch_size=20)
    machine["free"] = GB / 2
    with pytest.raises(GradmemError, match="smaller backbone"):
        choose()


def test_memory_is_measured() -> None:
    """Of what a step allocates and frees, the peak; what was freed before does not hide it."""

    def run(strategy: str, contexts: int) -> None:
        for _ in range(3):
            torch.ones(25 * contexts, 10**6)

    for contexts in (1, 3, 1):
        trial = plan._measure(run, "unroll", contexts, contexts, CPU)
        assert trial.bytes == pytest.approx(contexts * 10**8, rel=0.2)
        assert trial.seconds > 0


def test_planning_changes_nothing() -> None:
    some = recipe(strategy="auto", micro_batch_size=0)
    torch.manual_seed(0)
    model = MemoryModel.from_spec(some.task, some.backbone, some.method)
    before, numbers = [p.clone() for p in model.method.parameters()], torch.get_rng_state()
    made = plan_stage(some, some.stages[1], model.method, [build_task(TASK)], CPU, "fp32")
    assert {trial.strategy for trial in made.trials} == {"unroll", "recompute"}
    assert made.chosen in made.trials
    assert all(torch.equal(a, b) for a, b in zip(before, model.method.parameters(), strict=True))
    assert all(p.grad is None for p in model.method.parameters())
    assert torch.equal(numbers, torch.get_rng_state())
    assert model.method.strategy == "recompute"


def test_one_step_has_one_strategy() -> None:
    """With a single write step both strategies keep the same graph: nothing to compare."""
    some = recipe(strategy="auto", micro_batch_size=0)
    model = MemoryModel.from_spec(some.task, some.backbone, some.method)
    made = plan_stage(some, some.stages[0], model.method, [build_task(TASK)], CPU, "fp32")
    assert {trial.strategy for trial in made.trials} == {"recompute"}


def test_a_resumed_run_keeps_its_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "plan_stage", lambda *_: plan.Plan([], Trial("unroll", 2, 1.0, 1), 1))
    trainer = loop.Trainer(recipe(strategy="auto", micro_batch_size=0), tmp_path / "run")

    def stop(*_: Any) -> None:
        trainer._save()
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "_step", stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    state = loop.Trainer(recipe(strategy="auto", micro_batch_size=0), tmp_path / "run").state
    assert (state.strategy, state.micro_batch_size) == ("unroll", 2)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("no"),
    RuntimeError("not enough memory: you tried to allocate 8 bytes."),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_out_of_memory_says_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    whole = MetaStep.forward

    def forward(self: MetaStep, batch: Any, *rest: Any) -> Any:
        if len(batch.context) > 2:
            raise error
        return whole(self, batch, *rest)

    monkeypatch.setattr(MetaStep, "forward", forward)
    monkeypatch.setattr(plan, "MICRO_TOKENS", 20)
    with pytest.raises(GradmemError, match=r"`micro_batch_size: 8`; `strategy: \w+` and `micro_batch_size: [12]` take"):
        train(recipe(), tmp_path / "run")
    monkeypatch.setattr(MetaStep, "forward", lambda *_: (_ for _ in ()).throw(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        train(recipe(), tmp_path / "other")


@pytest.mark.parametrize(
    ("bf16_takes", "error", "taken", "reason"),
    [
        (0.5, 0.02, "bf16", "error of 2.0%"),
        (0.5, 0.17, "bf16", "error of 17.0%"),
        (0.5, 0.25, "fp32", "error of 25.0%"),
        (0.5, math.nan, "fp32", "error of nan%"),
        (7.0, 0.0, "fp32", "bf16 is slower on this processor"),
    ],
)
def test_bf16_only_where_it_is_faster_and_agrees(
    bf16_takes: float,
    error: float,
    taken: str,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`auto` says what it chose and why, keeps it in the state, and trains as that precision does."""
    monkeypatch.setattr(
        precision_module, "_product_seconds", lambda dtype: bf16_takes if dtype == torch.bfloat16 else 1.0
    )
    asked = []

    def gradient(precision: Precision) -> torch.Tensor:
        asked.append(precision)
        return torch.tensor([3.0, 4.0]) + (torch.tensor([3.0, 4.0]) * error if precision == "bf16" else 0)

    monkeypatch.setattr(plan, "choose_precision", lambda wanted, device, _: choose_precision(wanted, device, gradient))
    train(recipe(2, precision="auto"), tmp_path / "run")
    assert asked == (["fp32", "bf16"] * 2 if bf16_takes < 1 else [])  # at each stage
    said = " ".join(capsys.readouterr().err.split())
    assert f"precision {taken}: " in said
    assert reason in said
    state = states(tmp_path / "run" / "states")[-1]
    assert json.loads((state / "progress.json").read_text())["device"] == "cpu"
    train(recipe(2, precision=taken), tmp_path / "same")
    assert log(tmp_path / "run")[0]["loss"] == log(tmp_path / "same")[0]["loss"]


@pytest.mark.parametrize("wanted", ["fp32", "tf32", "bf16"])
def test_a_precision_that_is_asked_for_is_taken(wanted: Precision) -> None:
    def refuse(precision: Precision) -> torch.Tensor:
        raise AssertionError("nothing to measure")

    for device in ("cpu", "meta", "cuda"):
        assert choose_precision(wanted, torch.device(device), refuse) == (wanted, "")


def test_the_probe_measures_the_meta_gradient() -> None:
    """What the precisions are compared by is the gradient of a training step, and nothing is left of it."""
    some = recipe(precision="auto")
    model = MemoryModel.from_spec(some.task, some.backbone, some.method)
    stage, task, seen = some.stages[0], build_task(TASK), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "choose_precision", lambda wanted, device, gradient: seen.update(g=gradient("fp32")))
        plan.stage_precision(some, stage, model.method, [task], CPU)
    assert all(p.grad is None for p in model.method.parameters())
    batch = task.batch("train", 0, plan.PROBED, some.seed)
    weight = some.weight_of(stage)
    loss, write_loss, _ = MetaStep(model.method)(batch, max(stage.write_steps), task.scored(batch.labels), weight > 0)
    outer_loss(loss, write_loss, weight).backward()
    wanted = torch.cat([p.grad.flatten() for p in model.method.parameters() if p.grad is not None])
    assert torch.equal(seen["g"], wanted)


def test_auto_trains_the_same(tmp_path: Path) -> None:
    train(recipe(6), tmp_path / "settled")
    train(recipe(6, strategy="auto", micro_batch_size=0), tmp_path / "auto")
    losses = [[float(row["loss"]) for row in log(tmp_path / name)] for name in ("settled", "auto")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_plan_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = [{"tasks": [{"pairs": 2}], "write_steps": [1], "max_steps": 3600, "batch_size": 2}]
    options = ["--stages", json.dumps(stages), "--json", str(tmp_path / "plan.json")]
    assert main(["plan", "kv-32", *options]) == 0
    rows = json.loads((tmp_path / "plan.json").read_text())
    assert [row["chosen"] for row in rows].count(True) == 1
    assert {"strategy", "micro_batch_size", "seconds", "bytes", "stage", "budget"} <= rows[0].keys()
    shown = capsys.readouterr().out
    assert "recompute" in shown
    assert "chosen" in shown
    assert all(heading in shown for heading in ("contexts at a time", "hours for max_steps")), "piped: nothing is cut"
    assert not (tmp_path / "runs").exists()


def test_compiling_is_tried_on_a_gpu_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """In stages of more than twenty minutes, at the size that the other strategies settled; taken if it is faster."""
    some = recipe(strategy="auto", micro_batch_size=0)
    model = MemoryModel.from_spec(some.task, some.backbone, some.method)
    seconds, asked = {"unroll": 1.0, "compile": 0.5}, []

    def measured(run: Any, *_: Any, strategies: Any, micro_batch_size: int | None, processes: int) -> Plan:
        asked.append((strategies[0], micro_batch_size))
        trial = Trial(strategies[0], 3, seconds[strategies[0]], GB)
        return Plan([trial], trial, 10 * GB)

    def chosen(device: str, **changes: Any) -> str:
        asked.clear()
        stage = dataclasses.replace(some.stages[1], max_steps=int(plan.COMPILING_PAYS) + 1)
        changed = dataclasses.replace(some, **changes)
        planned = plan_stage(changed, stage, model.method, [build_task(TASK)], torch.device(device), "fp32")
        return planned.chosen.strategy

    monkeypatch.setattr(plan, "make_plan", measured)
    assert chosen("cuda") == "compile"
    assert asked == [("unroll", None), ("compile", 3)]
    assert chosen("cuda", max_minutes=plan.COMPILING_PAYS / 60 - 1) == chosen("cpu") == "unroll"
    seconds["compile"] = 1.5
    assert chosen("cuda") == "unroll"
    assert len(asked) == 2
    seconds["unroll"] = 0.9  # 18 minutes
    assert chosen("cuda") == "unroll"
    assert len(asked) == 1


def test_memory_that_is_kept_for_later_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """What PyTorch has freed and kept, which the device calls taken."""
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: (3 * GB, 10 * GB))
    monkeypatch.setattr(torch.accelerator, "memory_reserved", lambda device: 6 * GB)
    monkeypatch.setattr(torch.accelerator, "memory_allocated", lambda device: 2 * GB)
    assert free_memory(torch.device("cuda")) == 7 * GB


def test_how_much_at_once_follows_the_memory_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: (0, 80 * GB))
    device = torch.device("cuda", 5)
    assert elements_at_once(CPU, 100, 8) == 100
    assert elements_at_once(device, 100, 8) == 80 * GB // 4 // 8
    assert elements_at_once(device, 10**12, 8) == 10**12  # never less than on a CPU


def test_another_kind_of_device_is_planned_anew(tmp_path: Path) -> None:
    """A run that was begun on a GPU goes on on a CPU with the CPU's choices."""
    whole = recipe(6, precision="auto", strategy="auto", micro_batch_size=0)
    train(dataclasses.replace(whole, stages=whole.stages[:1]), tmp_path / "run")
    state = states(tmp_path / "run" / "states")[-1] / "progress.json"
    settled = {"device": "cuda", "precision": "tf32", "micro_batch_size": 77, "strategy": "compile", "stage": 0}
    state.write_text(json.dumps(json.loads(state.read_text()) | settled))
    train(whole, tmp_path / "run")
    after = json.loads((states(tmp_path / "run" / "states")[-1] / "progress.json").read_text())
    assert after["device"] == "cpu"
    assert after["strategy"] != "compile"


@pytest.mark.parametrize("part", [0.0, -1.0, 1.5])
def test_cooldown_is_a_part(part: float) -> None:
    with pytest.raises(GradmemError, match="cooldown is a fraction of max_minutes"):
        recipe(cooldown=part)


def test_plan_says_what_ends_a_run_early() -> None:
    """Hours of stages that end at an exact match are no forecast: they are what they could take at most."""
    row = {"stage": 1, "write_steps": 5, "strategy": "unroll", "micro_batch_size": 8, "seconds": 3.6, "steps": 10**5}
    rows = [{**row, "bytes": 1, "budget": 1, "chosen": True, "until_exact_match": until} for until in (0.9, None)]
    shown = str(plan_table(rows, max_minutes=90.0).caption)
    assert "200.0 hours if every stage takes its `max_steps`, which is rare: 1 of 2 stages" in shown
    assert "`max_minutes` ends the run after 1.5 hours" in shown
    assert "rare" not in str(plan_table(rows[1:]).caption)
    assert "max_minutes" not in str(plan_table(rows, max_minutes=1e9).caption)
