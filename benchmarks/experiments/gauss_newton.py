"""What a memory keeps for the time that its write steps take: a checkpoint's own steps, and Gauss-Newton steps.

Every context is written in both ways, one after the other; the time is that of the steps alone, without the queries
that are asked of the memory between them. Controls are the memories of other contexts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch

import gradmem
from benchmarks.common import Row, machine, measure, parser, report
from gradmem.batch import Batch
from gradmem.memory import Memory
from gradmem.methods import GradMem
from gradmem.model import MemoryModel
from gradmem.model.build import build_task
from gradmem.tasks.base import Task


@dataclass
class Point:
    """A context after some steps: what is recalled, what with another's memory, and the seconds that it took."""

    recalled: float
    swapped: float
    seconds: float


@dataclass
class Race:
    """A checkpoint on single contexts; each needs another one, for what is recalled with its memory."""

    model: MemoryModel
    task: Task
    batches: list[Batch]
    steps: list[int]
    ways: dict[str, int | None]
    """Its own steps before the Gauss-Newton steps, if any."""

    @torch.no_grad()
    def run(self, index: int) -> dict[str, dict[int, Point]]:
        """Write one context in every way: what there is after each number of steps."""
        own, other = self.batches[index], self.batches[index - 1]
        found = {}
        for name, after in self.ways.items():
            cast(GradMem, self.model.method).gauss_newton_after = after
            found[name] = {
                number: Point(self._recalled(memory, own), self._recalled(memory, other), seconds)
                for number, (memory, seconds) in enumerate(self._timed(own))
                if number in self.steps
            }
        return found

    def _timed(self, batch: Batch) -> Iterator[tuple[Memory, float]]:
        walk = self.model.method.trajectory(batch.context, max(self.steps))
        memory, seconds = next(walk).memory, 0.0
        yield memory, seconds
        for _ in range(max(self.steps)):
            started = time.perf_counter()
            memory = next(walk).memory
            seconds += time.perf_counter() - started
            yield memory, seconds

    def _recalled(self, memory: Memory, batch: Batch) -> float:
        logits = self.model.method.read_targets(memory, batch)
        return float(self.task.judge(logits, batch)["exact_match"].float().mean())


def rows(found: list[dict[int, Point]], name: str) -> list[Row]:
    """One row for each number of steps, over all contexts."""
    return [
        {
            "steps": name,
            "number": step,
            "EM, %": 100 * statistics.fmean(points[step].recalled for points in found),
            "swapped, %": 100 * statistics.fmean(points[step].swapped for points in found),
            "seconds, median": statistics.median(points[step].seconds for points in found),
        }
        for step in found[0]
    ]


def main() -> None:
    """Command line."""
    command = parser(__doc__, repeats=None)
    command.add_argument("--checkpoint", default="kv-96", help="GradMem on key-value pairs")
    command.add_argument("--pairs", type=int, default=96, metavar="N", help="pairs of a context")
    command.add_argument("--after", type=int, default=1, metavar="K", help="own steps before the Gauss-Newton steps")
    command.add_argument("--steps", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30], metavar="K")
    command.add_argument("--samples", type=int, default=16, help="fresh contexts, at least two")
    command.add_argument("--seed", type=int, default=1, help="their seed")
    options = command.parse_args()
    torch.set_num_threads(options.threads)
    if options.samples < 2:
        command.error("--samples must be at least 2: the controls are other contexts' memories")
    try:
        model = gradmem.load(options.checkpoint)
        task = build_task({**model.spec["task"], "pairs": options.pairs})
    except gradmem.GradmemError as error:
        command.error(str(error))
    where = machine(options.threads, "fp32")
    batches = [task.batch("test", i, 1, options.seed) for i in range(options.samples)]
    ways = {"its own": None, f"Gauss-Newton after {options.after}": options.after}
    race = Race(model, task, batches, options.steps, ways)
    title = f"{options.checkpoint}, {options.pairs} pairs, {options.samples} test contexts, seed {options.seed}"
    found = measure(title, [partial(race.run, index) for index in range(options.samples)])
    report(title, [row for name in ways for row in rows([one[name] for one in found], name)], where, options.json)


if __name__ == "__main__":
    main()
