"""Calibration of abstaining: fitted on validation contexts, measured on test contexts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..batch import Batch
from ..errors import GradmemError
from ..model import Answer, MemoryModel, reading
from ..model.abstain import Abstain, balanced, features
from ..model.build import build_task
from ..progress import Progress, silent
from ..tasks.base import WRITTEN, Split, Task
from .figures import figure

BINS = 10
"""Bins of probability for the calibration error."""
RIGHT, WRONG = "written here, answered right", "written here, answered wrong"
"""Kinds of answers to queries that the context answers; `Task.calibration` names the other kinds."""
MOST_AT_ONCE = 8
"""Most contexts of a batch; small, since the kind of context changes with each batch."""


@dataclass
class Calibration:
    """How well abstaining works, on contexts that it was not fitted on.

    Attributes
    ----------
    checkpoint, label : str
        Names of the checkpoint and of the task.
    abstain : Abstain
        The fitted model of whether an answer was written.
    samples, seed : int
        Test contexts, and their seed.
    answers : dict of list of Answer
        Answers by kind: `RIGHT`, `WRONG`, and the kinds of `Task.calibration`, whose queries the context does not
        answer. Only answers of the kind `RIGHT` count as written.
    """

    checkpoint: str
    label: str
    abstain: Abstain
    samples: int
    seed: int
    answers: dict[str, list[Answer]]

    @property
    def all(self) -> tuple[np.ndarray, np.ndarray]:
        """Probability that each answer was written, and whether it was, both of shape (answers,)."""
        judged = [(answer.written, kind == RIGHT) for kind, answers in self.answers.items() for answer in answers]
        probability, written = zip(*judged, strict=True)
        return np.array(probability), np.array(written)

    @property
    def accuracy(self) -> float:
        """Fraction of answers on the right side of the threshold, weighted so that the written ones count one half."""
        probability, written = self.all
        return float(balanced(written) @ ((probability >= self.abstain.threshold) == written))

    @property
    def bins(self) -> list[dict[str, float]]:
        """For each bin of probability that has answers: mean `probability`, fraction `written`, and `weight`."""
        probability, written = self.all
        weights = balanced(written)
        bin_of = np.minimum((probability * BINS).astype(int), BINS - 1)
        return [
            {
                "probability": float(np.average(probability[bin_of == i], weights=weights[bin_of == i])),
                "written": float(np.average(written[bin_of == i], weights=weights[bin_of == i])),
                "weight": float(weights[bin_of == i].sum()),
            }
            for i in np.unique(bin_of)
        ]

    @property
    def ece(self) -> float:
        """Expected calibration error: weighted mean distance of probability and fraction written."""
        return sum(part["weight"] * abs(part["probability"] - part["written"]) for part in self.bins)

    def auroc(self, kind: str) -> dict[str, float]:
        """Area under the ROC curve of answers that were written against those of another kind.

        This is the probability that, of one answer of each kind, the written one has the higher score. The score is the
        fitted probability (`all`), or one feature alone.
        """
        written, other = ([_evidence(answer) for answer in self.answers[name]] for name in (RIGHT, kind))
        return {
            name: _auroc(*(np.array([row[name] for row in rows]) for rows in (written, other))) for name in other[0]
        }

    def abstained(self, kind: str) -> float:
        """Fraction of the queries of a kind that are not answered."""
        return float(np.mean([answer.abstained for answer in self.answers[kind]]))

    @property
    def exact_match(self) -> float:
        """Fraction of right answers, among queries that the contexts answer."""
        right, wrong = (len(self.answers.get(kind, [])) for kind in (RIGHT, WRONG))
        return right / (right + wrong)

    @property
    def right_answered(self) -> float:
        """Fraction of right answers, among those of these queries that are answered."""
        right, wrong = (sum(not one.abstained for one in self.answers.get(kind, [])) for kind in (RIGHT, WRONG))
        return right / (right + wrong) if right + wrong else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """All measured values, as plain data."""
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
        """Draw a reliability diagram: fraction written by probability, and the distribution of probabilities."""
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
    progress: Progress = silent,
) -> Calibration:
    """Fit when to abstain on validation contexts, set `model.abstain`, and measure it on test contexts.

    Parameters
    ----------
    model : MemoryModel
    samples : int
        Contexts to fit on, and a quarter as many to measure on; `Task.calibration` says which queries are asked.
    seed : int
        Seed of the contexts.
    options : dict, optional
        Task options that differ from the checkpoint's, such as `{"pairs": 8}`.
    progress : callable
        Wraps the list of batches, to show progress.

    Raises
    ------
    GradmemError
        If there are fewer than two samples, the task cannot be calibrated, or all or none of the answers are right.
    """
    spec = {**model.spec["task"], **(options or {})}
    task = build_task(spec)
    found = _examine(model, task, "valid", samples, seed, progress)
    answers = [answer for kind in found.answers.values() for answer in kind]
    written = np.array([kind == RIGHT for kind, own in found.answers.items() for _ in own])
    if written.all() or not written.any():
        raise GradmemError(
            f"{written.sum()} of {len(written)} answers are right: calibration needs both right and wrong answers"
        )
    states = torch.cat([states for kind in found.states.values() for states in kind])
    contexts = np.array([context for kind in found.contexts.values() for context in kind])
    told = {key: value for key, value in spec.items() if key != "data"}  # a place on this machine alone
    about = {"task": told, "split": "valid", "samples": len(found.lengths), "seed": seed, "kinds": list(found.answers)}
    lengths = min(found.lengths), max(found.lengths)
    model.abstain = Abstain.fit(answers, states, written, contexts, model.fingerprints["checkpoint"], lengths, about)
    fresh = _examine(model, task, "test", max(2, samples // 4), seed, progress)
    judged = {
        kind: model.abstain.judge(own, torch.cat(fresh.states[kind])) for kind, own in fresh.answers.items() if own
    }
    if RIGHT not in judged:
        raise GradmemError("none of the answers to test contexts is right: there is nothing to measure")
    return Calibration(model.name, task.label, model.abstain, len(fresh.lengths), seed, judged)


@dataclass
class _Examined:
    """Answers, hidden states and numbers of their contexts by kind, and the lengths of the contexts in tokens."""

    answers: dict[str, list[Answer]]
    states: dict[str, list[torch.Tensor]]
    contexts: dict[str, list[int]]
    lengths: list[int]


def _examine(model: MemoryModel, task: Task, split: Split, samples: int, seed: int, progress: Progress) -> _Examined:
    """Write contexts of a split, and ask queries that they answer and queries that they do not."""
    there = task.calibration_size(split)
    samples = samples if there is None else min(samples, there)
    if samples < 2:
        raise GradmemError("calibration needs at least 2 samples: it also asks the queries of other contexts")
    # A batch needs two contexts: each is asked the queries of another one.
    length = task.calibration(split, 0, min(samples, MOST_AT_ONCE), seed)[WRITTEN].context.ids.shape[1]
    size = min(samples, MOST_AT_ONCE, max(2, model.method.backbone.contexts_at_once(length)))
    found = _Examined({RIGHT: [], WRONG: []}, {RIGHT: [], WRONG: []}, {RIGHT: [], WRONG: []}, [])
    for start in progress(list(range(0, samples // size * size, size)), f"{task.label}, {split}"):
        batches = task.calibration(split, start, size, seed)
        context = batches[WRITTEN].context.to(model.device)
        found.lengths += context.lengths.tolist()
        with torch.no_grad():
            memory = model.method.write(context).memory
            prefix = model.method.prefix(memory)
        for kind, asked in batches.items():
            if len(asked.rows):
                given = model.method, model.task, memory, prefix, asked.rows.tolist(), asked.prompts()
                _sort(task, kind, asked, start, *reading.answer(*given, {}), found)
    return found


def _sort(
    task: Task, kind: str, asked: Batch, start: int, answers: list[Answer], states: torch.Tensor, found: _Examined
) -> None:
    """Sort the answers to queries of one kind by whether they are right; `start` is the batch's first context."""
    references, rows = asked.references or [[] for _ in answers], asked.rows.tolist()
    for answer, own, row, labels, all_right in zip(answers, states.cpu(), rows, asked.labels, references, strict=True):
        right = task.right(answer.text, task.decode(labels[labels >= 0].tolist()), all_right)
        name = kind if kind != WRITTEN else RIGHT if right else WRONG
        found.answers.setdefault(name, []).append(answer)
        found.states.setdefault(name, []).append(own[None])
        found.contexts.setdefault(name, []).append(start + row)


def _evidence(answer: Answer) -> dict[str, float]:
    """Scores that are higher for written answers: the fitted probability, and each feature alone."""
    alone = features(answer)
    return {"all": answer.written or 0.0, **alone, "near_loss": -alone["near_loss"]}


def _auroc(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Probability that a positive is above a negative; ties count one half."""
    _, inverse, counts = np.unique(np.concatenate([positives, negatives]), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    least = len(positives) * (len(positives) + 1) / 2
    return float((ranks[: len(positives)].sum() - least) / (len(positives) * len(negatives)))
