"""Exact match and F1 of generated answers, question by question, with controls and a limit of time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gradmem.batch import Batch
from gradmem.model import MemoryModel
from gradmem.tasks.qa import QA

AT_ONCE = 73
"""Contexts that are written and asked at once when measuring."""


@dataclass
class Measured:
    """Scores of every question, by row of a table, and the answers given."""

    scores: dict[str, list[float]]
    answers: dict[str, list[str]]
    rows: list[int]
    complete: bool

    def table(self) -> dict[str, Any]:
        """Means over questions, and over contexts as `gradmem eval` takes them, in percent."""
        found: dict[str, Any] = {
            "questions": len(self.rows),
            "contexts": len(set(self.rows)),
            "complete": self.complete,
        }
        for name, values in self.scores.items():
            of_context: dict[int, list[float]] = {}
            for row, value in zip(self.rows, values, strict=False):
                of_context.setdefault(row, []).append(value)
            means = [statistics.fmean(some) for some in of_context.values()]
            if means:
                found[name] = round(100 * statistics.fmean(means), 2)
                found[f"{name} by question"] = round(100 * statistics.fmean(values), 2)
        return found


@torch.no_grad()
def measure(
    model: MemoryModel, task: QA, split: Any, contexts: int, steps: Sequence[int], controls: bool, end: float
) -> Measured:
    """Generate answers after each number of steps, as long as there is time; with controls after the last."""
    method, found = model.method, Measured({}, {}, [], True)
    count = min(contexts, task.size(split) or contexts)
    parts = -(-count // AT_ONCE)
    for part in torch.arange(count).tensor_split(parts):
        batch = task.batch(split, int(part[0]), len(part)).to(model.device)
        if time.perf_counter() > end:
            found.complete = False
            break
        found.rows += (batch.rows.cpu() + part[0]).tolist()
        for step, memory in _memories(method, batch, steps, controls):
            options = task.greedy_options()
            ids = method.generate(memory, batch.prompts(), batch.rows, pad_id=task.pad_id, **options)
            found.answers.setdefault(step, []).extend(task.decode(own) for own in ids)
            for name, values in task.judge_generated(ids, batch).items():
                found.scores.setdefault(f"{step} {name}", []).extend(values.tolist())
    return found


def _memories(method: Any, batch: Batch, steps: Sequence[int], controls: bool) -> Iterator[tuple[str, Any]]:
    nothing = method.without_text(len(batch.context)) if controls else None
    if nothing is not None:
        yield "unwritten", nothing
    for step, written in method.at_steps(batch.context, [0, *steps] if controls else list(steps)):
        yield (f"K={step}" if step or nothing is not None else "unwritten"), written.memory
        if controls and step == max(steps):
            yield "swapped", written.memory.select(torch.arange(len(batch.context)).roll(1).to(batch.rows.device))
