"""Go on from packaged checkpoints for some minutes, and measure what they are worth afterwards."""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from gradmem import load
from gradmem.errors import GradmemError
from gradmem.evaluation import evaluate
from gradmem.model.build import build_task
from gradmem.training import Recipe
from gradmem.training.progress import Report
from gradmem.training.recipe import load_recipe
from gradmem.training.step import MetaStep

from .common import Row, device, products, say

COMMON: dict[str, Any] = {
    "device": "auto",
    "precision": "auto",
    "max_minutes": None,
    "save_every": 500,
    "valid_samples": 64,
}
PLANS: dict[str, dict[str, Any]] = {
    "kv-64-k1": {
        "stages": [{"tasks": [{"pairs": n} for n in (64, 64, 32, 96, 16)], "write_steps": [1], "batch_size": 128}],
        "micro_batch_size": 128,
        "cooldown": 0.8,
        "asked": [(pairs, [1]) for pairs in (16, 32, 64, 96)],
    },
    "kv-96": {
        "stages": [
            {"tasks": [{"pairs": 96}], "write_steps": [5], "batch_size": 24, "lr_scale": 0.8, "warmup_steps": 50}
        ],
        "strategy": "compile",
        "micro_batch_size": 24,
        "cooldown": 0.4,
        "asked": [(96, [5, 30]), (64, [5])],
    },
}


class Lines(Report):
    """Progress as plain lines, every few seconds."""

    def __init__(self, name: str, every: float = 10.0) -> None:
        self.name, self.every, self.last, self.begun = name, every, 0.0, time.perf_counter()
        self.samples = 0

    def begin(self, index: int, stage: Any) -> None:
        """A stage begins."""
        say(f"{self.name}: stage {index + 1}")

    def show(self, row: dict[str, Any], state: Any) -> None:
        """A step was taken."""
        now = time.perf_counter()
        if now - self.last < self.every:
            return
        if self.last:
            rate = (row["samples"] - self.samples) / (now - self.last)
            match = sum(state.recent) / len(state.recent)
            say(
                f"{self.name}: step {row['step']} {row['samples']:,} contexts, {rate:.0f} a second, "
                f"loss {row['loss']:.4f}, EM {match:.2%}, norm {row['grad_norm']:.2g}, lr x{row['lr_scale']:.3g}"
            )
        self.last, self.samples = now, row["samples"]

    def end(self, state: Any) -> None:
        """A stage is over."""
        say(f"{self.name}: {state.samples:,} contexts in {state.step} steps and {state.seconds:.0f} s")

    def say(self, text: str) -> None:
        """Say something."""
        say(f"{self.name}: {text}")


def recipe(name: str, minutes: float, contexts: int | None) -> Recipe:
    """The run that goes on from a packaged checkpoint for some minutes."""
    plan = {**COMMON, **PLANS[name]}
    plan.pop("asked")
    stages = [{"max_steps": 10**6, "warmup_steps": 30, **stage} for stage in plan.pop("stages")]
    if contexts:
        plan["micro_batch_size"], plan["strategy"] = contexts, "recompute"
        stages = [{**stage, "batch_size": contexts} for stage in stages]
    made = load_recipe(name)
    extra = {**plan, "init_from": name, "max_minutes": minutes, "seed": 64}
    stage_type = type(made.stages[0])
    return dataclasses.replace(made, **extra, stages=[stage_type(**stage) for stage in stages])


def train(name: str, minutes: float, out: Path, samples: int, contexts: int | None = None) -> list[Row]:
    """Train and measure; the checkpoint is put into `out`, and the last one is what is measured."""
    from gradmem.training.trainer import Trainer

    runs = out / "runs" / name
    shutil.rmtree(runs, ignore_errors=True)
    trainer = Trainer(recipe(name, minutes, contexts), runs, "never", report=Lines(name))
    _compile(trainer, name)
    trainer.run()
    if torch.cuda.is_available():
        say(f"{name}: at most {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
    target = out / name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(runs / "checkpoint", target)
    shutil.copy(runs / "log.csv", out / f"{name}-log.csv")
    return measure(str(target), PLANS[name]["asked"], samples) if samples else []


def _compile(trainer: Any, name: str) -> None:
    """Compile the write steps before the minutes of training count; without a compiler go on as they are."""
    if trainer.recipe.strategy != "compile":
        return
    method, stage = trainer.model.method, trainer.recipe.stages[0]
    task = build_task({**trainer.recipe.task, **stage.tasks[0]})
    batch = task.batch("train", 0, trainer.recipe.micro_batch_size).to(device())
    method.strategy, started = "compile", time.perf_counter()
    try:
        with products("tf32"):
            loss, *_ = MetaStep(method, "tf32")(batch, stage.write_steps[0], task.scored(batch.labels), False)
            loss.backward()
        say(f"{name}: compiled in {time.perf_counter() - started:.0f} s")
    except (GradmemError, RuntimeError) as error:
        say(f"{name}: does not compile, so it is unrolled: {error}")
        trainer.recipe = dataclasses.replace(trainer.recipe, strategy="unroll")
    method.zero_grad()


def measure(
    where: str, asked: list[tuple[int, list[int]]], samples: int, method: dict[str, Any] | None = None
) -> list[Row]:
    """Exact match on fresh test contexts, with control rows."""
    rows = []
    model = load(where, method).to(device())
    for pairs, steps in asked:
        started = time.perf_counter()
        for result in evaluate(model, steps, samples, seed=1, task={"pairs": pairs}):
            row = {"checkpoint": where, "pairs": pairs, "steps": result.steps, "exact_match": result.exact_match}
            row |= {"low": result.ci95[0], "high": result.ci95[1], "unwritten": result.unwritten}
            row |= {"swapped": result.swapped, "samples": samples, "seed": 1}
            rows.append(row)
        say(f"{where}: {pairs} pairs {rows[-1]['exact_match']:.2%} in {time.perf_counter() - started:.0f} s")
    return rows
