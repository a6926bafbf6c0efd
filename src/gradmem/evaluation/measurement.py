"""Exact match after any number of write steps, with control rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..batch import Batch
from ..errors import GradmemError
from ..memory import Memory
from ..methods.base import Method
from ..model import MemoryModel
from ..model.build import build_task
from ..progress import Progress, silent
from ..tasks.base import Split, Task
from .result import Result, interval

DEFAULT_SAMPLES = 1000
"""Contexts to measure by default, if contexts are generated without end."""
PROBED = 64
"""Contexts at the beginning and at the end of a split; the longest of them limits how many are written at once."""

Statistics = dict[tuple[str, str, int], tuple[float, tuple[float, float]]]
"""Mean and 95 % interval by metric, kind of memory ("own", "swapped") and write steps."""


class Measurement:
    """Scores of all contexts, collected batch by batch; `results` turns them into one `Result` for each step.

    Parameters
    ----------
    model : MemoryModel
    task : Task
        What the contexts are of.
    spec : dict
        The task's name and options.
    steps : sequence of int
        Numbers of write steps, in ascending order.
    swapped_steps : int
        The number of steps after which memories are swapped for the control.
    """

    def __init__(
        self, model: MemoryModel, task: Task, spec: dict[str, Any], steps: Sequence[int], swapped_steps: int
    ) -> None:
        self.model, self.task, self.spec = model, task, spec
        self.steps, self.swapped_steps = steps, swapped_steps
        self.scores: dict[tuple[str, str, int], list[Tensor]] = {}
        self.losses: dict[int, list[Tensor]] = {}
        self.contexts = self.queries = self.bytes = self.vectors = 0

    def add(self, step: int, kind: str, memory: Memory, batch: Batch) -> None:
        """Read a memory and score its answers.

        Parameters
        ----------
        step : int
            Write steps of the memory.
        kind : {"own", "swapped", "unwritten"}
            Whether each context is asked of its own memory, of another context's, or of that of no text.
        memory : Memory
        batch : Batch
        """
        method = self.model.method
        for name, values in _score(method, self.task, memory, batch).items():
            self.scores.setdefault((name, kind, step), []).append(values)
        if kind == "own":
            losses = method.token_losses(memory, batch.context).sum(1) / batch.context.lengths
            self.losses.setdefault(step, []).append(losses)
            if step == self.steps[-1]:
                self.contexts, self.queries = self.contexts + len(batch.context), self.queries + len(batch.rows)
                self.bytes, self.vectors = self.bytes + memory.nbytes, self.vectors + method.vectors(memory)

    def results(self, split: Split, seed: int) -> list[Result]:
        """Means and intervals over all contexts, for each number of steps.

        Parameters
        ----------
        split, seed
            Where the contexts came from.
        """
        joined = {key: torch.cat(parts).double().cpu().numpy() for key, parts in self.scores.items()}
        statistics = {key: (float(values.mean()), interval(values)) for key, values in joined.items()}
        return [self._result(step, statistics, split, seed) for step in self.steps]

    def _result(self, step: int, statistics: Statistics, split: Split, seed: int) -> Result:
        found = self._with_controls(step, statistics)
        means = {name: mean for name, (mean, _) in found.items()}
        intervals = {name: bounds for name, (_, bounds) in found.items()}
        method = self.model.method
        return Result(
            checkpoint=self.model.name,
            task=self.spec,
            label=self.task.label,
            source=self.task.source(split),
            steps=step,
            exact_match=means.pop("exact_match"),
            ci95=intervals.pop("exact_match"),
            write_loss=float(torch.cat(self.losses[step]).mean()),
            unwritten=means.pop("unwritten"),
            swapped=means.pop("swapped"),
            swapped_steps=self.swapped_steps,
            samples=self.contexts,
            queries=self.queries,
            seed=seed,
            split=split,
            parameters=sum(p.numel() for p in method.parameters()),
            n_mem=round(self.vectors / self.contexts),
            d=method.backbone.width,
            bytes=round(self.bytes / self.contexts),
            method=dict(self.model.overrides),
            metrics=means,
            intervals=intervals,
            from_context=_starts(statistics),
        )

    def _with_controls(self, step: int, statistics: Statistics) -> dict[str, tuple[float, tuple[float, float]]]:
        """Mean and interval of each metric after a step, and of its controls."""
        controls = {
            "unwritten": (0, "unwritten" if _starts(statistics) else "own"),
            "swapped": (self.swapped_steps, "swapped"),
        }
        found = {}
        for name in dict.fromkeys(name for name, _, _ in statistics):
            found[name] = statistics[name, "own", step]
            for control, (at, kind) in controls.items():
                found[control if name == "exact_match" else f"{control}_{name}"] = statistics[name, kind, at]
        return found


def evaluate(
    model: MemoryModel,
    steps: Sequence[int] | None = None,
    samples: int | None = None,
    seed: int = 1,
    split: Split = "test",
    task: dict[str, Any] | None = None,
    convert: Callable[[Memory], Memory] = lambda memory: memory,
    swapped_steps: int | None = None,
    progress: Progress = silent,
) -> list[Result]:
    """Write fresh contexts once and read them after each number of steps asked for.

    Parameters
    ----------
    model : MemoryModel
    steps : sequence of int, optional
        Numbers of write steps. Each context is written once and read after each of these steps, unless sequential
        chunks make that impossible. Default: the checkpoint's own number.
    samples : int, optional
        Contexts, at most as many as the split has; all of their queries are asked. Default: the whole split, or 1000
        if contexts are generated without end.
    seed : int
        Seed of the contexts.
    split : {"test", "valid", "train"}
        Split that the contexts come from; no checkpoint is trained on the "test" split of any seed.
    task : dict, optional
        Task options that differ from the checkpoint's, such as `{"pairs": 64}`.
    convert : callable
        Applied to every memory before it is read, for example a round trip through int8.
    swapped_steps : int, optional
        The number of steps after which memories are swapped for the control. Default: the largest.
    progress : callable
        Wraps the list of batches, to show progress.

    Returns
    -------
    list of Result
        One for each number of steps, in ascending order.

    Raises
    ------
    GradmemError
        If the method cannot take that many steps, a context does not fit, or samples are too few.
    """
    steps = sorted({model.method.write_steps} if steps is None else set(steps))
    if not steps or steps[0] < 0:
        raise GradmemError(f"steps must be one or more numbers of at least 0, not {steps}")
    swapped_steps = steps[-1] if swapped_steps is None else swapped_steps
    if swapped_steps not in steps:
        raise GradmemError(f"swapped_steps is {swapped_steps}, and must be one of the steps {steps}")
    spec = {**model.spec["task"], **(task or {})}
    built = build_task(spec)
    there = built.size(split)
    samples = (there or DEFAULT_SAMPLES) if samples is None else samples if there is None else min(samples, there)
    if samples < 2:
        raise GradmemError("evaluation needs at least 2 samples: the control swaps memories between contexts")
    probed = min(samples, PROBED)
    length = max(built.batch(split, at, probed, seed).context.ids.shape[1] for at in (0, samples - probed))
    sizes = _split(samples, max(2, model.method.backbone.contexts_at_once(length)))
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    measurement = Measurement(model, built, spec, steps, swapped_steps)
    with torch.no_grad():
        for start, size in progress(list(zip(starts, sizes, strict=True)), built.label):
            batch = built.batch(split, start, size, seed).to(model.device)
            _check_lengths(model, built, batch)
            if (nothing := model.method.without_text(size)) is not None:
                measurement.add(0, "unwritten", convert(nothing), batch)
            for step, written in model.method.at_steps(batch.context, [0, *steps]):
                memory = convert(written.memory)
                measurement.add(step, "own", memory, batch)
                if step == swapped_steps:
                    measurement.add(step, "swapped", memory.select(torch.arange(size).roll(1)), batch)
            if step < steps[-1]:
                raise GradmemError(
                    f"{steps[-1]} steps were asked for; the method of '{model.name}' takes at most {step}"
                )
    return measurement.results(split, seed)


def _starts(statistics: Statistics) -> bool:
    """Whether the start itself is made from the context, so that the memory of no text is a control of its own."""
    return any(kind == "unwritten" for _, kind, _ in statistics)


def _split(samples: int, most: int) -> list[int]:
    """Batch sizes that differ by at most one, so that no batch has a single memory, which could not be swapped."""
    count = -(-samples // most)
    return [samples // count + (i < samples % count) for i in range(count)]


def _check_lengths(model: MemoryModel, task: Task, batch: Batch) -> None:
    """Refuse contexts and queries that the model cannot hold."""
    asked = int((batch.labels == -100).logical_and(batch.queries.mask).sum(1).max()) + task.answer_length
    longest = {
        "contexts": (batch.context.ids.shape[1], model.method.max_context, model.method.too_long_advice),
        "queries": (max(asked, batch.queries.ids.shape[1]), model.method.max_query, ""),
    }
    for what, (length, limit, advice) in longest.items():
        if length > limit:
            raise GradmemError(f"{what} have {length} tokens; the limit of '{model.name}' is {limit}{advice}")


def _score(method: Method, task: Task, memory: Memory, batch: Batch) -> dict[str, Tensor]:
    """Every metric, averaged over the queries of each context, shape (contexts,)."""
    found: dict[str, Tensor] = {}
    if task.reads:
        found |= task.judge(method.read_targets(memory, batch), batch)
    if task.generates:
        found |= task.judge_generated(_generate(method, task, memory, batch), batch)
    rows = batch.rows.cpu()  # not every device counts in float64
    count = torch.bincount(rows, minlength=len(batch.context))
    means = {}
    for name, values in found.items():
        total = torch.zeros(len(batch.context), dtype=torch.double)
        means[name] = total.index_add(0, rows, values.cpu().double()) / count
    return means


def _generate(method: Method, task: Task, memory: Memory, batch: Batch) -> list[list[int]]:
    """Greedy answers to the queries."""
    return method.generate(memory, batch.prompts(), batch.rows, pad_id=task.pad_id, **task.greedy_options())
