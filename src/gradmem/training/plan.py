"""How to run the training steps of a stage: measured on a few contexts before the stage begins."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..device import device_named
from ..errors import GradmemError
from ..inner.meta_gradient import Strategy
from ..methods.base import Method
from ..model import MemoryModel
from ..model.build import build_task
from ..tasks.base import Task
from .device_memory import forget_peak, free_memory, peak
from .precision import choose_precision, matmul_precision
from .recipe import Precision, Recipe, Stage
from .step import MetaStep, outer_loss

MICRO_TOKENS = 3072
"""Context tokens of the largest micro-batch on a CPU: enough for full speed; more only cost memory and page faults."""
SHARE = 0.8
"""Part of the free memory that a step may take."""
PROBED = 2
"""Contexts whose meta-gradient is compared in two precisions."""
WORTH = 0.95
"""What takes more memory must take at most this part of the time."""

AUTO: Sequence[Strategy] = ("unroll", "recompute")
"""Strategies to choose from where a recipe leaves it. Whether compiling pays on a CPU the user knows."""
COMPILING_PAYS = 1200.0
"""Seconds that the rest of a stage must take on a GPU before compiled write steps, which take a minute or two to
compile, are tried as well."""

Run = Callable[[Strategy, int], None]


@dataclass
class Trial:
    """One way to run a training step, as measured.

    Attributes
    ----------
    strategy : {"unroll", "recompute", "compile"}
    micro_batch : int
        Contexts at a time.
    seconds : float
        Of a whole optimiser step; on a CPU processor time, divided by the number of threads.
    bytes : int
        Peak memory beyond what was in use before.
    """

    strategy: Strategy
    micro_batch: int
    seconds: float
    bytes: int


@dataclass
class Plan:
    """The trials of a stage, the chosen one among them, and the bytes that a step may take."""

    trials: list[Trial]
    chosen: Trial
    budget: int


def make_plan(
    run: Run,
    contexts: int,
    tokens: int,
    device: torch.device,
    *,
    strategies: Sequence[Strategy] = AUTO,
    micro_batch: int | None = None,
    processes: int = 1,
) -> Plan:
    """Measure steps and choose the fastest that fits.

    Parameters
    ----------
    run : callable
        `run(strategy, contexts)` runs forward and backward passes of that many contexts.
    contexts : int
        Contexts of this process in a step.
    tokens : int
        Tokens of the longest context.
    strategies : sequence of {"unroll", "recompute", "compile"}
        Those to choose from.
    micro_batch : int, optional
        Contexts at a time, where that is settled.
    processes : int
        Processes of the run, which share the memory on a CPU; elsewhere each has a device of its own.

    Raises
    ------
    GradmemError
        When nothing fits.
    """
    budget = int(SHARE * free_memory(device)) // (processes if device.type == "cpu" else 1)
    run("recompute", 1)  # libraries and threads start
    probes = {strategy: _measure(run, strategy, 1, contexts, device) for strategy in strategies}
    most = contexts if device.type != "cpu" else min(contexts, max(1, MICRO_TOKENS // tokens))
    trials = []
    for strategy, probe in probes.items():
        fits = budget // max(probe.bytes, 1)
        sizes = [micro_batch] if micro_batch else _halves(contexts, min(most, fits))
        if strategy == "compile":
            sizes = sizes[-1:]  # each takes minutes
        for size in (size for size in sizes if size <= fits):
            trials.append(probe if size == 1 else _measure(run, strategy, size, contexts, device))
    if not trials:
        least = min(probes.values(), key=lambda trial: trial.bytes)
        fits = budget // max(least.bytes, 1)
        need = gigabytes(least.bytes * (micro_batch or 1))
        raise GradmemError(
            f"{micro_batch or 1} contexts of {tokens} tokens at a time take about {need} with '{least.strategy}', and "
            f"{gigabytes(budget)} may be used: "
            + (f"`micro_batch: {fits}` fits" if fits else "shorten them, or take a smaller backbone or fewer processes")
        )
    flattest = min(trials, key=lambda trial: (trial.strategy != "recompute", trial.seconds))
    fastest = min(trials, key=lambda trial: trial.seconds)
    chosen = fastest if fastest.seconds < WORTH * flattest.seconds else flattest
    return Plan(trials, chosen, budget)


def stage_precision(
    recipe: Recipe, stage: Stage, method: Method, tasks: Sequence[Task], device: torch.device
) -> tuple[Precision, str]:
    """The precision of a stage and the reason for it; see `choose_precision`. Changes nothing."""
    task, steps, weight = _longest(recipe, tasks, 1)[1], max(stage.write_steps), recipe.weight_of(stage)

    def gradient(precision: Precision) -> Tensor:
        batch = task.batch("train", 0, PROBED, recipe.seed).to(device)
        step = MetaStep(method, precision)
        loss, write_loss, _ = step(batch, steps, task.scored(batch.labels), weight > 0)
        outer_loss(loss, write_loss, weight).backward()
        grads = [p.grad.flatten() for p in method.parameters() if p.grad is not None]
        method.zero_grad()
        return torch.cat(grads)

    with torch.random.fork_rng():
        try:
            return choose_precision(recipe.precision, device, gradient)
        finally:
            method.zero_grad()


def _longest(recipe: Recipe, tasks: Sequence[Task], contexts: int) -> tuple[int, Task]:
    """The task with the longest contexts, and their tokens."""
    lengths = [task.batch("train", 0, contexts, recipe.seed).context.ids.shape[1] for task in tasks]
    return max(zip(lengths, tasks, strict=True), key=lambda pair: pair[0])


def plan_recipe(recipe: Recipe) -> Iterator[tuple[Stage, Plan]]:
    """Measure every stage of a recipe, without training anything."""
    device = device_named(recipe.device)
    model = MemoryModel.from_spec(recipe.task, recipe.backbone, recipe.method).to(device)
    for stage in recipe.stages:
        tasks = [build_task({**recipe.task, **options}) for options in stage.tasks]
        precision, _ = stage_precision(recipe, stage, model.method, tasks, device)
        with matmul_precision(precision, device):
            yield stage, plan_stage(recipe, stage, model.method, tasks, device, precision)


def plan_stage(
    recipe: Recipe,
    stage: Stage,
    method: Method,
    tasks: Sequence[Task],
    device: torch.device,
    precision: Precision,
    processes: int = 1,
) -> Plan:
    """Measure and choose for the longest contexts and the most write steps of a stage, as far as the recipe leaves it.

    Weights, gradients and random numbers are afterwards as they were before.
    """
    share = stage.batch_size // processes
    tokens, task = _longest(recipe, tasks, share)
    step, before, steps = MetaStep(method, precision), method.strategy, max(stage.write_steps)
    strategies: Sequence[Strategy] = AUTO if recipe.strategy == "auto" else [recipe.strategy]
    one_by_one = method.chunk_size is not None and method.chunk_mode == "sequential"
    if steps <= 1 and recipe.strategy == "auto" and not one_by_one:
        strategies = ["recompute"]  # which keeps the last step: the same

    def run(strategy: Strategy, contexts: int) -> None:
        method.strategy = strategy
        batch = task.batch("train", 0, contexts, recipe.seed).to(device)
        weight = recipe.weight_of(stage)
        loss, write_loss, _ = step(batch, steps, task.scored(batch.labels), weight > 0)
        outer_loss(loss, write_loss, weight).backward()
        method.zero_grad()

    def measured(strategies: Sequence[Strategy], micro_batch: int | None) -> Plan:
        return make_plan(
            run, share, tokens, device, strategies=strategies, micro_batch=micro_batch, processes=processes
        )

    with torch.random.fork_rng():
        try:
            plan = measured(strategies, min(recipe.micro_batch, share) or None)
            ahead = min(plan.chosen.seconds * stage.max_steps, 60 * (recipe.max_minutes or math.inf))
            if recipe.strategy == "auto" and device.type == "cuda" and ahead > COMPILING_PAYS:
                compiled = measured(["compile"], plan.chosen.micro_batch)
                best = min(plan.chosen, compiled.chosen, key=lambda trial: trial.seconds)
                plan = Plan(plan.trials + compiled.trials, best, plan.budget)
            return plan
        finally:
            method.zero_grad()
            method.strategy = before


def _halves(contexts: int, most: int) -> list[int]:
    """The largest part when contexts are split evenly into parts of up to `most`, and of up to half as many."""
    return sorted({-(-contexts // -(-contexts // size)) for size in (most, most // 2) if size})


def _measure(run: Run, strategy: Strategy, size: int, contexts: int, device: torch.device) -> Trial:
    if strategy == "compile":
        run(strategy, size)
    before = forget_peak(device)
    start = clock(device)
    run(strategy, size)
    seconds = (clock(device) - start) * contexts / size
    return Trial(strategy, size, seconds, max(0, peak(device) - before))


def clock(device: torch.device) -> float:
    """Seconds. On a CPU those of this process's threads, so that other work on the machine does not count."""
    if device.type == "cpu":
        return time.process_time() / torch.get_num_threads()
    torch.accelerator.synchronize(device)
    return time.perf_counter()


def gigabytes(size: int) -> str:
    """A size for people."""
    return f"{size / 1e9:.2f} GB"
