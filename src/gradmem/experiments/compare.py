"""Comparison of systems on the same contexts: what each stores, in how many bytes, at what cost."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from ..errors import GradmemError
from ..evaluation.measurement import evaluate
from ..evaluation.result import Result, break_even
from ..methods.base import Method
from ..methods.full_context import FullContext
from ..model import MemoryModel
from ..model.build import build_task
from ..progress import Progress, silent
from ..training.recipe import Recipe, load_recipe
from .cost import Cost, measure

CURVE_POINTS = 200
"""Largest number of points of a training curve."""


@dataclass(frozen=True)
class Training:
    """How much a system was trained; None and empty if its run is not available.

    Attributes
    ----------
    samples : int, optional
        Contexts trained on.
    seconds : float, optional
        Time of training.
    curve : tuple of (float, float)
        Minutes of training, and the mean number of pairs per training context answered right at that time.
    """

    samples: int | None = None
    seconds: float | None = None
    curve: tuple[tuple[float, float], ...] = ()

    @classmethod
    def of(cls, run: Path) -> Training:
        """Read it from the log and the recipe of a run."""
        log = run / "log.csv"
        if not log.exists():
            return cls()
        with log.open(newline="") as file:
            rows = list(csv.DictReader(file))
        if not rows:
            return cls()
        asked = _pairs_of_stages(load_recipe(str(run / "recipe.yaml")))
        recalled = [float(row["exact_match"]) * asked[int(row["stage"])] for row in rows]
        size = math.ceil(len(rows) / CURVE_POINTS)
        curve = tuple(
            (float(rows[start]["seconds"]) / 60, fmean(recalled[start : start + size]))
            for start in range(0, len(rows), size)
        )
        return cls(int(rows[-1]["samples"]), float(rows[-1]["seconds"]), curve)


def _pairs_of_stages(recipe: Recipe) -> list[float]:
    """Mean number of pairs per context, for each stage."""
    own = recipe.task.get("pairs", 0)
    return [fmean(options.get("pairs", own) for options in stage.tasks) for stage in recipe.stages]


@dataclass(frozen=True)
class Entry:
    """The measurements of one system at one number of pairs.

    Attributes
    ----------
    result : Result
        Exact match with its control rows.
    cost : Cost
        Cost of the system.
    reference : Cost
        Cost of the full context with the same kind of backbone, where a write is one pass over the context.
    training : Training
    """

    result: Result
    cost: Cost
    reference: Cost
    training: Training

    @property
    def beats_rereading(self) -> float:
        """Smallest number of queries for which writing once is cheaper than reading the context for each query."""
        again = self.reference.write_seconds + self.reference.query_seconds
        return break_even(self.cost.write_seconds, self.cost.query_seconds, 0.0, again)

    @property
    def beats_kept_cache(self) -> float:
        """Smallest number of queries for which writing once is cheaper than keeping the KV-cache of the context."""
        reference = self.reference
        return break_even(
            self.cost.write_seconds, self.cost.query_seconds, reference.write_seconds, reference.query_seconds
        )

    def to_dict(self) -> dict[str, Any]:
        """All values as one flat row; None for a number of queries that does not exist."""
        never = {math.inf: None}
        return {
            **self.result.to_dict(),
            **asdict(self.cost),
            **{f"full_context_{key}": value for key, value in asdict(self.reference).items()},
            "cheaper_than_rereading_from": never.get(self.beats_rereading, self.beats_rereading),
            "cheaper_than_kept_cache_from": never.get(self.beats_kept_cache, self.beats_kept_cache),
            "trained_samples": self.training.samples,
            "trained_seconds": self.training.seconds,
        }


def compare(
    systems: Sequence[tuple[MemoryModel, Training]],
    pairs: Sequence[int],
    samples: int = 500,
    seed: int = 1,
    repeats: int = 5,
    progress: Progress = silent,
) -> list[Entry]:
    """Measure systems on the same contexts, each with the number of write steps that it was trained with.

    Parameters
    ----------
    systems : sequence of (MemoryModel, Training)
    pairs : sequence of int
        Numbers of key-value pairs in a context.
    samples : int
        Test contexts; all of their queries are asked.
    seed : int
        Seed of the contexts.
    repeats : int
        Timed runs for the cost.
    progress : callable
        Wraps the list of batches, to show progress.

    Returns
    -------
    list of Entry
        For each system, one entry for each number of pairs.

    Raises
    ------
    GradmemError
        If none of the systems has a backbone with a KV-cache, which is the reference for the cost.
    """
    reference = _reference(model.method for model, _ in systems)
    costs: dict[int, Cost] = {}
    entries = []
    for model, training in systems:
        for count in pairs:
            task = build_task({**model.spec["task"], "pairs": count})
            if count not in costs:
                costs[count] = measure(reference, task, repeats)
            found = evaluate(model, None, samples, seed, task={"pairs": count}, progress=progress)
            entries.append(Entry(found[-1], measure(model.method, task, repeats), costs[count], training))
    return entries


def _reference(methods: Iterable[Method]) -> FullContext:
    """The full context as a memory, on the first backbone that has a KV-cache."""
    for method in methods:
        try:
            return FullContext(method.backbone)
        except GradmemError:
            continue
    raise GradmemError("none of these systems has a KV-cache to compare with: add a system on a transformer")
