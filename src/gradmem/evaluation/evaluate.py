"""Exact match after any number of write steps, with control rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..batch import TOKENS_AT_ONCE, Batch
from ..errors import GradmemError
from ..memory import Memory
from ..methods.base import Method
from ..model import MemoryModel, build_task
from ..tasks.base import Split, Task
from ..training.step import exact_match


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
        Memory vectors and their width; n_mem is 0 where the memory is something else.
    bytes : int
        Bytes of one memory after the most steps, mean over contexts.
    """

    checkpoint: str
    task: dict[str, Any]
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

    @property
    def size(self) -> str:
        """Size of a memory in words."""
        return f"{self.n_mem} vectors of {self.d}, {self.bytes} bytes" if self.n_mem else f"{self.bytes} bytes"

    def row(self) -> dict[str, Any]:
        """The result as one flat row; the task's options (as `pairs`) stand beside the rest."""
        fields = asdict(self)
        task = fields.pop("task")
        return {
            "checkpoint": fields.pop("checkpoint"),
            **{k: v for k, v in task.items() if k != "name"},
            **fields,
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
    samples: int = 1000,
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
        Numbers of write steps; all are read off one trajectory. By default the checkpoint's own number.
    samples : int
        Contexts; all of their queries are asked.
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
    if samples < 2:
        raise GradmemError("evaluation needs at least 2 samples: memories are swapped between contexts")
    spec = {**model.spec["task"], **(task or {})}
    built = build_task(spec)
    length = built.batch(split, 0, 1, seed).context.ids.shape[1]
    if length > model.method.max_context:
        raise GradmemError(f"contexts have {length} tokens; the limit of '{model.name}' is {model.method.max_context}")
    sizes = _split(samples, max(2, TOKENS_AT_ONCE // length))
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    scores: dict[tuple[str, int], list[Tensor]] = {}
    losses: dict[int, list[Tensor]] = {}
    title = " ".join(f"{value} {key}" for key, value in spec.items() if key != "name")
    queries = nbytes = 0
    with torch.no_grad():
        for start, size in progress(list(zip(starts, sizes, strict=True)), title):
            batch = built.batch(split, start, size, seed).to(model.device)
            queries += len(batch.rows)
            for step, written in enumerate(model.method.trajectory(batch.context, steps[-1])):
                if step not in steps and step:
                    continue
                memory = convert(written.memory)
                token_losses = model.method.token_losses(memory, batch.context)
                losses.setdefault(step, []).append(token_losses.sum(1) / batch.context.lengths)
                scores.setdefault(("own", step), []).append(_score(model.method, built, memory, batch))
                if step == steps[-1]:
                    nbytes += memory.nbytes
                if step == swapped_steps:
                    others = memory.select(torch.arange(size).roll(1))
                    scores.setdefault(("swapped", step), []).append(_score(model.method, built, others, batch))
            if step < steps[-1]:
                raise GradmemError(
                    f"{steps[-1]} steps asked for; the method of '{model.name}' takes no more than {step}"
                )
    joined = {key: torch.cat(parts).double().cpu().numpy() for key, parts in scores.items()}
    method = model.method
    return [
        Result(
            checkpoint=model.name,
            task=spec,
            steps=step,
            exact_match=float(joined["own", step].mean()),
            ci95=interval(joined["own", step]),
            write_loss=float(torch.cat(losses[step]).mean()),
            unwritten=float(joined["own", 0].mean()),
            swapped=float(joined["swapped", swapped_steps].mean()),
            swapped_steps=swapped_steps,
            samples=samples,
            queries=queries,
            seed=seed,
            split=split,
            parameters=sum(p.numel() for p in method.parameters()),
            n_mem=method.n_mem,
            d=method.backbone.width,
            bytes=round(nbytes / samples),
        )
        for step in steps
    ]


def _split(samples: int, most: int) -> list[int]:
    """Batch sizes that differ by at most one, so that none has a single row to swap."""
    count = -(-samples // most)
    return [samples // count + (i < samples % count) for i in range(count)]


def _score(method: Method, task: Task, memory: Memory, batch: Batch) -> Tensor:
    """Fraction of its queries that each context answers exactly, shape (contexts,)."""
    logits = method.read_targets(memory, batch.queries, batch.labels, batch.rows)
    correct = exact_match(logits.argmax(-1), batch.labels, task.scored(batch.labels)).double()
    count = torch.bincount(batch.rows, minlength=len(batch.context))
    total = torch.zeros(len(batch.context), dtype=torch.double, device=correct.device)
    return total.index_add(0, batch.rows, correct) / count
