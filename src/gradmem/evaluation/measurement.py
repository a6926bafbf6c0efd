"""Exact match after any number of write steps, with control rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
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
from ..tasks.base import Split, Task

UNLIMITED = 1000
"""Contexts where the caller does not say and the split has no end."""
PROBED = 64
"""Contexts at either end whose longest one says how many to write at once."""


@dataclass
class Result:
    """Exact match over all queries of each context, and what is needed to measure it again.

    Attributes
    ----------
    steps : int
        Write steps.
    exact_match : float
        Mean over contexts of the fraction of queries answered exactly, 0 to 1.
    ci95 : tuple of float
        95 % interval, bootstrapped over contexts.
    write_loss : float
        Mean write loss of the memory that is read, nats per token.
    unwritten, swapped : float
        Controls, which must be at chance: exact match from the memory before any step, and from memories of
        other contexts after `swapped_steps`.
    n_mem, d : int
        Memory vectors, mean over contexts, and their width; n_mem is 0 where the memory is something else.
    bytes : int
        Bytes of one memory after the most steps, mean over contexts.
    label, source : str
        What the task calls itself, and where its contexts come from: "generated", or their data.
    method : dict
        Options of the method that were chosen anew, as `{"chunk_size": 113}`.
    metrics : dict of float
        The task's other metrics, averaged as exact match is; their controls are `unwritten_NAME`, `swapped_NAME`.
    intervals : dict of tuple
        95 % intervals, as `ci95`, of the controls `unwritten` and `swapped` and of all `metrics`.
    """

    checkpoint: str
    task: dict[str, Any]
    label: str
    source: str
    steps: int
    exact_match: float
    ci95: tuple[float, float]
    write_loss: float
    unwritten: float
    swapped: float
    swapped_steps: int
    samples: int
    queries: int
    seed: int
    split: str
    parameters: int
    n_mem: int
    d: int
    bytes: int
    method: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def bits_per_vector(self) -> float | None:
        """Bits by which each memory vector makes the target cheaper, where the task counts `bits`."""
        if "bits" not in self.metrics or not self.n_mem:
            return None
        return (self.metrics["unwritten_bits"] - self.metrics["bits"]) / self.n_mem

    @property
    def size(self) -> str:
        """Size of a memory in words."""
        return f"{self.n_mem} vectors of {self.d}, {self.bytes} bytes" if self.n_mem else f"{self.bytes} bytes"

    def to_dict(self) -> dict[str, Any]:
        """The result as one flat row; the task's options (as `pairs`) stand beside the rest."""
        fields = asdict(self)
        task, metrics, method, intervals = (fields.pop(name) for name in ("task", "metrics", "method", "intervals"))
        if self.bits_per_vector is not None:
            metrics["bits_per_vector"] = self.bits_per_vector
        return {
            "checkpoint": fields.pop("checkpoint"),
            "task": fields.pop("label"),
            **{k: v for k, v in task.items() if k != "name"},
            **fields,
            **{f"method.{name}": value for name, value in method.items()},
            **metrics,
            **{f"{name}_ci95": bounds for name, bounds in intervals.items()},
        }


def interval(scores: np.ndarray, seed: int = 0, resamples: int = 2000) -> tuple[float, float]:
    """95 % interval of the mean, by bootstrap over contexts.

    Parameters
    ----------
    scores : array, shape (contexts,)
    """
    random = np.random.default_rng(seed)
    means = [scores[random.integers(len(scores), size=len(scores))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def evaluate(
    model: MemoryModel,
    steps: Sequence[int] | None = None,
    samples: int | None = None,
    seed: int = 1,
    split: Split = "test",
    task: dict[str, Any] | None = None,
    convert: Callable[[Memory], Memory] = lambda memory: memory,
    swapped_steps: int | None = None,
    progress: Callable[[Iterable[Any], str], Iterable[Any]] = lambda batches, title: batches,
) -> list[Result]:
    """Write fresh contexts once and read them after each number of steps asked for.

    Parameters
    ----------
    model : MemoryModel
    steps : sequence of int, optional
        Numbers of write steps; all are read off one trajectory, unless sequential chunks make this impossible. By
        default the checkpoint's own number.
    samples : int, optional
        Contexts, at most as many as the split has; all of their queries are asked. By default all of a split that
        has an end, otherwise 1000.
    seed, split
        Which samples; nothing is trained on the "test" split of any seed.
    task : dict, optional
        Task options that differ from the checkpoint's, as `{"pairs": 64}`.
    convert : callable
        Applied to every memory before it is read, as a round trip through int8.
    swapped_steps : int, optional
        After which of the steps memories are swapped for the control; by default the last.
    progress : callable
        Wraps the list of batches, to show progress.

    Raises
    ------
    GradmemError
        When the method takes fewer steps than asked for, a context does not fit, or samples are too few.
    """
    steps = sorted({model.method.write_steps} if steps is None else set(steps))
    if not steps or steps[0] < 0:
        raise GradmemError(f"steps must be at least 0: {steps}")
    swapped_steps = steps[-1] if swapped_steps is None else swapped_steps
    if swapped_steps not in steps:
        raise GradmemError(f"the swapped control is after {swapped_steps} steps, which are not among {steps}")
    spec = {**model.spec["task"], **(task or {})}
    built = build_task(spec)
    there = built.size(split)
    samples = (there or UNLIMITED) if samples is None else samples if there is None else min(samples, there)
    if samples < 2:
        raise GradmemError("evaluation needs at least 2 samples: memories are swapped between contexts")
    probed = min(samples, PROBED)
    length = max(built.batch(split, at, probed, seed).context.ids.shape[1] for at in (0, samples - probed))
    sizes = _split(samples, max(2, model.method.backbone.tokens_at_once // length))
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    scores: dict[tuple[str, str, int], list[Tensor]] = {}
    losses: dict[int, list[Tensor]] = {}
    queries = nbytes = vectors = 0

    def score(kind: str, step: int, memory: Memory, batch: Batch) -> None:
        for name, values in _score(model.method, built, memory, batch).items():
            scores.setdefault((name, kind, step), []).append(values)

    with torch.no_grad():
        for start, size in progress(list(zip(starts, sizes, strict=True)), built.label):
            batch = built.batch(split, start, size, seed).to(model.device)
            _check_lengths(model, built, batch)
            queries += len(batch.rows)
            for step, written in model.method.at_steps(batch.context, [0, *steps]):
                memory = convert(written.memory)
                token_losses = model.method.token_losses(memory, batch.context)
                losses.setdefault(step, []).append(token_losses.sum(1) / batch.context.lengths)
                score("own", step, memory, batch)
                if step == swapped_steps:
                    score("swapped", step, memory.select(torch.arange(size).roll(1)), batch)
                if step == steps[-1]:
                    nbytes, vectors = nbytes + memory.nbytes, vectors + model.method.vectors(memory)
            if step < steps[-1]:
                raise GradmemError(
                    f"{steps[-1]} steps asked for; the method of '{model.name}' takes no more than {step}"
                )
    joined = {key: torch.cat(parts).double().cpu().numpy() for key, parts in scores.items()}
    statistics = {key: (float(values.mean()), interval(values)) for key, values in joined.items()}
    method = model.method
    controls = {"unwritten": (0, "own"), "swapped": (swapped_steps, "swapped")}

    def measured(step: int) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
        """Means and intervals of all metrics after a step, and of their controls."""
        found = {}
        for name in dict.fromkeys(name for name, _, _ in statistics):
            found[name] = statistics[name, "own", step]
            for control, (at, kind) in controls.items():
                found[control if name == "exact_match" else f"{control}_{name}"] = statistics[name, kind, at]
        return {name: mean for name, (mean, _) in found.items()}, {name: bounds for name, (_, bounds) in found.items()}

    def result(step: int) -> Result:
        means, intervals = measured(step)
        return Result(
            checkpoint=model.name,
            task=spec,
            label=built.label,
            source=built.source(split),
            steps=step,
            exact_match=means.pop("exact_match"),
            ci95=intervals.pop("exact_match"),
            write_loss=float(torch.cat(losses[step]).mean()),
            unwritten=means.pop("unwritten"),
            swapped=means.pop("swapped"),
            swapped_steps=swapped_steps,
            samples=samples,
            queries=queries,
            seed=seed,
            split=split,
            parameters=sum(p.numel() for p in method.parameters()),
            n_mem=round(vectors / samples),
            d=method.backbone.width,
            bytes=round(nbytes / samples),
            method=dict(model.overrides),
            metrics=means,
            intervals=intervals,
        )

    return [result(step) for step in steps]


def _split(samples: int, most: int) -> list[int]:
    """Batch sizes that differ by at most one, so that none has a single row to swap."""
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
    """Every metric of each context, the mean over its queries, shape (contexts,)."""
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
    """Greedy answers to the queries, from what stands before their targets."""
    options = {"max_new_tokens": task.answer_length, "do_sample": False, "eos_token_id": task.end_id}
    return method.generate(memory, batch.prompts(), batch.rows, pad_id=task.pad_id, **options)
