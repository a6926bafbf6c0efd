"""Sweep over pairs and write steps: each context is written once and read after every step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import GradmemError
from ..evaluation.measurement import evaluate
from ..evaluation.result import Result
from ..model import MemoryModel
from ..model.build import build_task
from ..progress import Progress, silent

FEW = 5
"""Largest number of steps that the paper calls few."""


@dataclass
class Point:
    """The results of a checkpoint at one number of pairs.

    Attributes
    ----------
    checkpoint : str
    trained_steps : int
        Write steps in training.
    pairs : int
    results : dict of Result
        Results on test contexts, by number of write steps.
    few, best : int
        The best number of steps on validation contexts: of at most `FEW`, and of all.
    """

    checkpoint: str
    trained_steps: int
    pairs: int
    results: dict[int, Result]
    few: int
    best: int

    @property
    def bits(self) -> float:
        """Bits of information in a context; NaN if the task does not count them."""
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
    progress: Progress = silent,
) -> list[Point]:
    """Measure a checkpoint at several numbers of pairs and after several numbers of write steps.

    Parameters
    ----------
    model : MemoryModel
    pairs : sequence of int
        Numbers of key-value pairs in a context.
    steps : sequence of int
        Numbers of write steps.
    samples, valid_samples : int
        Test contexts, and validation contexts that choose the best numbers of steps.
    seed : int
        Seed of the contexts.
    progress : callable
        Wraps the list of batches, to show progress.

    Returns
    -------
    list of Point
        One for each number of pairs.

    Raises
    ------
    GradmemError
        If a context with that many pairs does not fit, or no number of steps is above 0.
    """
    if not any(step > 0 for step in steps):
        raise GradmemError("a sweep needs numbers of write steps above 0, such as --steps 0..30")
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
