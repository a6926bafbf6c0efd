"""When to abstain: fitted on validation contexts, measured on test contexts, with a reliability figure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..batch import Batch
from ..errors import GradmemError
from ..memory import Memory
from ..model import MemoryModel
from ..model.abstain import Abstain, Answer, balanced, features
from ..model.build import build_task
from ..tasks.base import WRITTEN, Split, Task
from .figures import figure

BINS = 10
RIGHT, WRONG = "written here, answered right", "written here, answered wrong"
"""Kinds of answers to queries that the context answers; the other kinds are those of `Task.calibration`."""
MOST_AT_ONCE = 8
"""Contexts of a batch: kinds of contexts take turns with the batches."""


@dataclass
class Calibration:
    """How well abstaining works, on contexts that it was not fitted on.

    Attributes
    ----------
    answers : dict of list of Answer
        By kind: `RIGHT`, `WRONG`, and the kinds of `Task.calibration` that nothing in the context answers. Only an
        answer of the first kind was written.
    """

    checkpoint: str
    label: str
    abstain: Abstain
    samples: int
    seed: int
    answers: dict[str, list[Answer]]

    @property
    def all(self) -> tuple[np.ndarray, np.ndarray]:
        """Probability that the answer was written, and whether it was, both of shape (answers,)."""
        judged = [(answer.written, kind == RIGHT) for kind, answers in self.answers.items() for answer in answers]
        probability, written = zip(*judged, strict=True)
        return np.array(probability), np.array(written)

    @property
    def accuracy(self) -> float:
        """Fraction of the queries told apart by the threshold; either kind weighs one half."""
        probability, written = self.all
        return float(balanced(written) @ ((probability >= self.abstain.threshold) == written))

    @property
    def bins(self) -> list[dict[str, float]]:
        """Mean `probability` and fraction `written` of the answers in each tenth of probability, and their `weight`."""
        probability, written = self.all
        weights = balanced(written)
        place = np.minimum((probability * BINS).astype(int), BINS - 1)
        return [
            {
                "probability": float(np.average(probability[place == i], weights=weights[place == i])),
                "written": float(np.average(written[place == i], weights=weights[place == i])),
                "weight": float(weights[place == i].sum()),
            }
            for i in np.unique(place)
        ]

    @property
    def ece(self) -> float:
        """Expected calibration error: mean distance of probability and fraction, over the bins by their weight."""
        return sum(part["weight"] * abs(part["probability"] - part["written"]) for part in self.bins)

    def auroc(self, kind: str) -> dict[str, float]:
        """How well answers of this kind are told from those that were written: by `all`, and by each feature alone.

        The area under the ROC curve: the chance that of two answers, one of either kind, the written one stands out.
        """
        written, other = ([_evidence(answer) for answer in self.answers[name]] for name in (RIGHT, kind))
        return {
            name: _auroc(*(np.array([row[name] for row in rows]) for rows in (written, other))) for name in other[0]
        }

    def abstained(self, kind: str) -> float:
        """Fraction of a kind that is not answered."""
        return float(np.mean([answer.abstained for answer in self.answers[kind]]))

    @property
    def exact_match(self) -> float:
        """Fraction of right answers to queries that the contexts answer."""
        right, wrong = (len(self.answers.get(kind, [])) for kind in (RIGHT, WRONG))
        return right / (right + wrong)

    @property
    def right_answered(self) -> float:
        """The same among those that are not abstained from."""
        right, wrong = (sum(not one.abstained for one in self.answers.get(kind, [])) for kind in (RIGHT, WRONG))
        return right / (right + wrong) if right + wrong else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """All that was measured, as plain data."""
        return {
            "checkpoint": self.checkpoint,
            "task": self.label,
            "samples": self.samples,
            "seed": self.seed,
            "accuracy": self.accuracy,
            "expected_calibration_error": self.ece,
            "exact_match": self.exact_match,
            "exact_match_answered": self.right_answered,
            "abstained": {kind: self.abstained(kind) for kind in self.answers},
            "auroc": {kind: self.auroc(kind) for kind in self.answers if kind != RIGHT},
            "bins": self.bins,
            "abstain": {name: value for name, value in vars(self.abstain).items() if name != "weights"},
        }

    def figure(self, path: Path) -> Path:
        """Draw fraction written by probability, and how often which probability is given."""
        with figure(path, rows=2, height=3.2) as (top, bottom):
            parts = self.bins
            top.plot([0, 1], [0, 1], "--", color="0.6", label="perfectly calibrated")
            x, y = ([part[name] for part in parts] for name in ("probability", "written"))
            top.plot(x, y, marker="o", label=f"measured: ECE {self.ece:.2%}, accuracy {self.accuracy:.2%}")
            top.set(xlim=(-0.02, 1.02), ylim=(-0.03, 1.03), ylabel="fraction written")
            top.set_title(f"{self.checkpoint}, {self.label}: {self.samples} test contexts, seed {self.seed}")
            top.legend(frameon=False)
            for kind, answers in self.answers.items():
                given = [answer.written for answer in answers]
                weights = np.full(len(given), 1 / len(given))
                bottom.hist(
                    given, np.linspace(0, 1, 2 * BINS + 1), weights=weights, histtype="step", lw=1.5, label=kind
                )
            bottom.axvline(self.abstain.threshold, color="0.6", ls=":", label="threshold")
            bottom.set(
                xlim=(-0.02, 1.02), xlabel="probability that the answer was written", ylabel="fraction of queries"
            )
            bottom.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.12, 1))
        return path


def calibrate(
    model: MemoryModel,
    samples: int = 1000,
    seed: int = 1,
    options: dict[str, Any] | None = None,
    progress: Callable[[Iterable[Any], str], Iterable[Any]] = lambda batches, title: batches,
) -> Calibration:
    """Fit when to abstain on validation contexts, give it to the model, and measure it on test contexts.

    Parameters
    ----------
    model : MemoryModel
    samples : int
        Contexts to fit on, and a fourth as many to measure on; their queries are those of `Task.calibration`.
    seed : int
        Seed of the contexts.
    options : dict, optional
        Task options that differ from the checkpoint's, as `{"pairs": 8}`.
    progress : callable
        Wraps the list of batches, to show progress.

    Raises
    ------
    GradmemError
        When there are too few samples, the task has none, or all answers are right or none is.
    """
    spec = {**model.spec["task"], **(options or {})}
    task = build_task(spec)
    found = _examine(model, task, "valid", samples, seed, progress)
    answers = [answer for kind in found.answers.values() for answer in kind]
    written = np.array([kind == RIGHT for kind, own in found.answers.items() for _ in own])
    if written.all() or not written.any():
        raise GradmemError(f"of {len(written)} answers {written.sum()} are right: there is nothing to tell apart")
    states = torch.cat([states for kind in found.states.values() for states in kind])
    about = {"task": spec, "split": "valid", "samples": samples, "seed": seed, "kinds": list(found.answers)}
    lengths = min(found.lengths), max(found.lengths)
    model.abstain = Abstain.fit(answers, states, written, model.fingerprints["checkpoint"], lengths, about)
    fresh = _examine(model, task, "test", max(2, samples // 4), seed, progress)
    judged = {
        kind: model.abstain.judge(own, torch.cat(fresh.states[kind])) for kind, own in fresh.answers.items() if own
    }
    if RIGHT not in judged:
        raise GradmemError("none of the answers to test contexts is right: there is nothing to measure")
    return Calibration(model.name, task.label, model.abstain, len(fresh.lengths), seed, judged)


@dataclass
class _Examined:
    """Answers by kind with their states, and the lengths of the contexts."""

    answers: dict[str, list[Answer]]
    states: dict[str, list[torch.Tensor]]
    lengths: list[int]


def _examine(
    model: MemoryModel, task: Task, split: Split, samples: int, seed: int, progress: Callable[..., Iterable[Any]]
) -> _Examined:
    """Ask contexts of a split what they answer and what they do not."""
    there = task.size(split)
    samples = samples if there is None else min(samples, there)
    if samples < 2:
        raise GradmemError("calibration needs at least 2 samples: queries are asked of other contexts")
    # A batch of one context would ask its own queries of itself.
    length = task.calibration(split, 0, min(samples, MOST_AT_ONCE), seed)[WRITTEN].context.ids.shape[1]
    size = min(samples, MOST_AT_ONCE, max(2, model.method.backbone.tokens_at_once // length))
    found = _Examined({RIGHT: [], WRONG: []}, {RIGHT: [], WRONG: []}, [])
    for start in progress(list(range(0, samples // size * size, size)), f"{task.label}, {split}"):
        batches = task.calibration(split, start, size, seed)
        context = batches[WRITTEN].context.to(model.device)
        found.lengths += context.lengths.tolist()
        with torch.no_grad():
            memory = model.method.write(context).memory
        for kind, asked in batches.items():
            if len(asked.rows):
                _ask(model, task, memory, kind, asked, found)
    return found


def _ask(model: MemoryModel, task: Task, memory: Memory, kind: str, asked: Batch, found: _Examined) -> None:
    """Ask the queries of one kind."""
    answers, states = model.evidence(memory, asked.rows.tolist(), asked.prompts())
    for answer, own, labels in zip(answers, states.cpu(), asked.labels, strict=True):
        wanted = task.decode(labels[labels >= 0].tolist())
        name = kind if kind != WRITTEN else RIGHT if answer.text == wanted else WRONG
        found.answers.setdefault(name, []).append(answer)
        found.states.setdefault(name, []).append(own[None])


def _evidence(answer: Answer) -> dict[str, float]:
    """What tells written queries, the more the higher: all of it, and each feature alone."""
    alone = features(answer)
    return {"all": answer.written or 0.0, **alone, "near_loss": -alone["near_loss"]}


def _auroc(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Chance that a positive is above a negative; a tie counts one half."""
    _, place, counts = np.unique(np.concatenate([positives, negatives]), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    least = len(positives) * (len(positives) + 1) / 2
    return float((ranks[: len(positives)].sum() - least) / (len(positives) * len(negatives)))
