"""Choosing how a stage computes its training steps, by measuring a few of them before the stage begins."""

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
"""Context tokens of the largest micro-batch on a CPU; larger ones are not faster and need more memory."""
SHARE = 0.8
"""Fraction of the free memory that a step may use."""
PROBED = 2
"""Contexts for comparing the meta-gradient in two precisions."""
WORTH = 0.95
"""A strategy that needs more memory must run in at most this fraction of the time."""

AUTO: Sequence[Strategy] = ("unroll", "recompute")
"""Strategies that `auto` chooses from. On a CPU, `compile` is left to the user."""
COMPILING_PAYS = 1200.0
"""Seconds that a stage must take on a GPU before `auto` also tries `compile`, which needs a minute or two to start."""

Run = Callable[[Strategy, int], None]


@dataclass
class Trial:
    """One way to compute a training step, and what it took.

    Attributes
    ----------
    strategy : {"unroll", "recompute", "compile"}
    micro_batch_size : int
        Contexts of one pass.
    seconds : float
        Time of a whole optimizer step; on a CPU processor time, divided by the number of threads.
    bytes : int
        Peak memory, beyond what was in use before.
    """

    strategy: Strategy
    micro_batch_size: int
    seconds: float
    bytes: int


@dataclass
class Plan:
    """The trials of a stage, and the one that was chosen."""

    trials: list[Trial]
    chosen: Trial
    budget: int
    """Bytes that a step may use."""


def make_plan(
    run: Run,
    contexts: int,
    tokens: int,
    device: torch.device,
    *,
    strategies: Sequence[Strategy] = AUTO,
    micro_batch_size: int | None = None,
    processes: int = 1,
) -> Plan:
    """Measure training steps and choose the fastest way that fits into memory.

    Parameters
    ----------
    run : callable
        `run(strategy, contexts)` runs a forward and a backward pass of that many contexts.
    contexts : int
        Contexts of this process in an optimizer step.
    tokens : int
        Tokens of the longest context.
    device : torch.device
    strategies : sequence of {"unroll", "recompute", "compile"}
        Strategies to choose from.
    micro_batch_size : int, optional
        Contexts of one pass. Default: measured too.
    processes : int
        Processes of the run. On a CPU they share the memory; elsewhere each has a device to itself.

    Raises
    ------
    GradmemError
        If nothing fits into memory.
    """
    budget = int(SHARE * free_memory(device)) // (processes if device.type == "cpu" else 1)
    run("recompute", 1)  # so that no trial pays for starting libraries and threads
    probes = {strategy: _measure(run, strategy, 1, contexts, device) for strategy in strategies}
    most = contexts if device.type != "cpu" else min(contexts, max(1, MICRO_TOKENS // tokens))
    trials = []
    for strategy, probe in probes.items():
        fits = budget // max(probe.bytes, 1)
        sizes = [micro_batch_size] if micro_batch_size else _halves(contexts, min(most, fits))
        if strategy == "compile":
            sizes = sizes[-1:]  # each takes minutes
        for size in (size for size in sizes if size <= fits):
            trials.append(probe if size == 1 else _measure(run, strategy, size, contexts, device))
    if not trials:
        least = min(probes.values(), key=lambda trial: trial.bytes)
        fits = budget // max(least.bytes, 1)
        need = gigabytes(least.bytes * (micro_batch_size or 1))
        raise GradmemError(
            f"{micro_batch_size or 1} contexts of {tokens} tokens at a time need about {need} with '{least.strategy}', "
            f"and {gigabytes(budget)} may be used: "
            + (
                f"`micro_batch_size: {fits}` fits"
                if fits
                else "use shorter contexts, a smaller backbone or fewer processes"
            )
        )
    flattest = min(trials, key=lambda trial: (trial.strategy != "recompute", trial.seconds))
    fastest = min(trials, key=lambda trial: trial.seconds)
    chosen = fastest if fastest.seconds < WORTH * flattest.seconds else flattest
    return Plan(trials, chosen, budget)


def stage_precision(
    recipe: Recipe, stage: Stage, method: Method, tasks: Sequence[Task], device: torch.device
) -> tuple[Precision, str]:
    """The precision of a stage and the reason for it; see `choose_precision`. Weights and gradients do not change."""
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
    """The length of the longest context in tokens, and its task."""
    lengths = [task.batch("train", 0, contexts, recipe.seed).context.ids.shape[1] for task in tasks]
    return max(zip(lengths, tasks, strict=True), key=lambda pair: pair[0])


def plan_recipe(recipe: Recipe) -> Iterator[tuple[Stage, Plan]]:
    """Measure all stages of a recipe without training."""
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
    """Choose strategy and micro-batch size for the longest contexts and the most write steps of a stage.

    Only what the recipe leaves open is measured. Weights, gradients and random numbers do not change.

    Parameters
    ----------
    recipe : Recipe
    stage : Stage
    method : Method
    tasks : sequence of Task
        The tasks of the stage.
    device : torch.device
    precision : {"fp32", "tf32", "bf16"}
    processes : int
        Processes of the run.
    """
    share = stage.batch_size // processes
    tokens, task = _longest(recipe, tasks, share)
    step, before, steps = MetaStep(method, precision), method.strategy, max(stage.write_steps)
    strategies: Sequence[Strategy] = AUTO if recipe.strategy == "auto" else [recipe.strategy]
    one_by_one = method.chunk_size is not None and method.chunk_mode == "sequential"
    if steps <= 1 and recipe.strategy == "auto" and not one_by_one:
        strategies = ["recompute"]  # with one step it is the same as unroll

    def run(strategy: Strategy, contexts: int) -> None:
        method.strategy = strategy
        batch = task.batch("train", 0, contexts, recipe.seed).to(device)
        weight = recipe.weight_of(stage)
        loss, write_loss, _ = step(batch, steps, task.scored(batch.labels), weight > 0)
        outer_loss(loss, write_loss, weight).backward()
        method.zero_grad()

    def measured(strategies: Sequence[Strategy], micro_batch_size: int | None) -> Plan:
        return make_plan(
            run, share, tokens, device, strategies=strategies, micro_batch_size=micro_batch_size, processes=processes
        )

    with torch.random.fork_rng():
        try:
            plan = measured(strategies, min(recipe.micro_batch_size, share) or None)
            ahead = min(plan.chosen.seconds * stage.max_steps, 60 * (recipe.max_minutes or math.inf))
            if recipe.strategy == "auto" and device.type == "cuda" and ahead > COMPILING_PAYS:
                compiled = measured(["compile"], plan.chosen.micro_batch_size)
                best = min(plan.chosen, compiled.chosen, key=lambda trial: trial.seconds)
                plan = Plan(plan.trials + compiled.trials, best, plan.budget)
            return plan
        finally:
            method.zero_grad()
            method.strategy = before


def _halves(contexts: int, most: int) -> list[int]:
    """Sizes of the largest part when contexts are split evenly into parts of at most `most`, or half of `most`."""
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
    """Seconds; on a CPU the processor time of each thread, which other work on the machine does not change."""
    if device.type == "cpu":
        return time.process_time() / torch.get_num_threads()
    torch.accelerator.synchronize(device)
    return time.perf_counter()


def gigabytes(size: int) -> str:
    """Format a number of bytes for people."""
    return f"{size / 1e9:.2f} GB"
