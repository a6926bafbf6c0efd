"""Exact match by pairs and by steps: one trajectory of each context, read after every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import GradmemError
from ..evaluation.measurement import evaluate
from ..evaluation.result import Result
from ..model import MemoryModel
from ..model.build import build_task

FEW = 5
"""Steps that the paper calls few."""


@dataclass
class Point:
    """A checkpoint at one number of pairs.

    Attributes
    ----------
    trained_steps : int
        Write steps the checkpoint was trained with.
    results : dict of Result
        On test contexts, by number of steps.
    few, best : int
        Numbers of steps that validation contexts choose: of at most five, and of all.
    """

    checkpoint: str
    trained_steps: int
    pairs: int
    results: dict[int, Result]
    few: int
    best: int

    @property
    def bits(self) -> float:
        """What a context says; NaN where the task does not count it."""
        return float(getattr(build_task(self.results[self.best].task), "bits", math.nan))

    def to_dicts(self) -> list[dict[str, Any]]:
        """One flat row for each number of steps."""
        about = {"trained_steps": self.trained_steps}
        return [
            {**result.to_dict(), **about, "chosen_of_few": steps == self.few, "chosen_of_all": steps == self.best}
            for steps, result in self.results.items()
        ]


def sweep(
    model: MemoryModel,
    pairs: Sequence[int],
    steps: Sequence[int],
    samples: int = 500,
    valid_samples: int = 200,
    seed: int = 1,
    progress: Callable[[Iterable[Any], str], Iterable[Any]] = lambda batches, title: batches,
) -> list[Point]:
    """Measure a checkpoint at several numbers of pairs and after every number of steps.

    Raises
    ------
    GradmemError
        When a context with so many pairs does not fit, or no number of steps is positive.
    """
    if not any(step > 0 for step in steps):
        raise GradmemError("a sweep needs write steps above 0, as --steps 0..30")
    points = []
    for count in pairs:
        task = {"pairs": count}
        found = evaluate(model, steps, valid_samples, seed, "valid", task, progress=progress)
        valid = {result.steps: result.exact_match for result in found if result.steps}
        few, best = [step for step in valid if step <= FEW], _best(valid, valid)
        test = evaluate(model, steps, samples, seed, "test", task, swapped_steps=best, progress=progress)
        points.append(
            Point(
                checkpoint=model.name,
                trained_steps=model.method.write_steps,
                pairs=count,
                results={result.steps: result for result in test},
                few=_best(valid, few) if few else best,
                best=best,
            )
        )
    return points


def _best(scores: dict[int, float], among: Iterable[int]) -> int:
    return max(among, key=lambda step: (scores[step], -step))
