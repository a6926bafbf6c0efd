"""When to abstain: fitted on validation contexts, measured on test contexts, with a reliability figure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from ..errors import GradmemError
from ..model import MemoryModel
from ..specs import build_task
from ..tasks.base import Split, Task
from ..trust import Abstain, Answer, balanced, features
from .report import figure

BINS = 10
SHORTER = 2
"""Contexts down to this part of the shortest one examined are judged alike."""
WRITTEN = "written here"


@dataclass
class Calibration:
    """How well abstaining works, on contexts that it was not fitted on.

    Attributes
    ----------
    answers : dict of list of Answer
        By kind of query: those whose answer was written, and the kinds of the task's `unwritten`.
    right : array, bool
        Whether each answer to a query of the first kind is the true one.
    """

    checkpoint: str
    label: str
    abstain: Abstain
    samples: int
    seed: int
    answers: dict[str, list[Answer]]
    right: np.ndarray

    @property
    def all(self) -> tuple[np.ndarray, np.ndarray]:
        """Probability that the answer was written, and whether it was, both of shape (answers,)."""
        judged = [(answer.written, kind == WRITTEN) for kind, answers in self.answers.items() for answer in answers]
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
        """How well this kind of unwritten queries is told from written ones: by `all`, and by each feature alone.

        The area under the ROC curve: the chance that of two queries, one of either kind, the written one stands out.
        """
        written, other = ([_evidence(answer) for answer in self.answers[name]] for name in (WRITTEN, kind))
        return {
            name: _auroc(*(np.array([row[name] for row in rows]) for rows in (written, other))) for name in other[0]
        }

    def abstained(self, kind: str) -> float:
        """Fraction of a kind that is not answered."""
        return float(np.mean([answer.abstained for answer in self.answers[kind]]))

    @property
    def right_answered(self) -> float:
        """Fraction of right answers among those to written queries that are not abstained from."""
        answered = [not answer.abstained for answer in self.answers[WRITTEN]]
        return float(self.right[answered].mean()) if any(answered) else float("nan")

    def row(self) -> dict[str, Any]:
        """All that was measured, as plain data."""
        return {
            "checkpoint": self.checkpoint,
            "task": self.label,
            "samples": self.samples,
            "seed": self.seed,
            "accuracy": self.accuracy,
            "expected_calibration_error": self.ece,
            "exact_match": float(self.right.mean()),
            "exact_match_answered": self.right_answered,
            "abstained": {kind: self.abstained(kind) for kind in self.answers},
            "auroc": {kind: self.auroc(kind) for kind in self.answers if kind != WRITTEN},
            "bins": self.bins,
            "abstain": vars(self.abstain),
        }

    def table(self) -> Table:
        """What was measured, one line for each kind of query."""
        built = Table(
            title=f"{self.checkpoint}, {self.label}: abstaining, {self.samples} test contexts, seed {self.seed}",
            caption=f"accuracy {self.accuracy:.2%} at P(written) = {self.abstain.threshold}, calibration error (ECE) "
            f"{self.ece:.2%}, either kind one half; right: {self.right.mean():.2%} of the written queries, "
            f"{self.right_answered:.2%} of those answered; on the right: area under the ROC curve, %, by all "
            "evidence and by each alone",
            pad_edge=False,
            collapse_padding=True,
        )
        names = list(_evidence(self.answers[WRITTEN][0]))
        for heading in ("queries", "count", "abstained %", *(name.replace("_", "\n") for name in names)):
            built.add_column(heading, justify="left" if heading == "queries" else "right", no_wrap=heading == "queries")
        for kind, answers in self.answers.items():
            areas = [] if kind == WRITTEN else [f"{100 * area:.2f}" for area in self.auroc(kind).values()]
            built.add_row(kind, str(len(answers)), f"{100 * self.abstained(kind):.2f}", *areas)
        return built

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
    samples: int = 100,
    seed: int = 1,
    options: dict[str, Any] | None = None,
    progress: Callable[[Iterable[Any], str], Iterable[Any]] = lambda batches, title: batches,
) -> Calibration:
    """Fit when to abstain on validation contexts, give it to the model, and measure it on test contexts.

    Parameters
    ----------
    model : MemoryModel
    samples : int
        Contexts of either split; all of their queries are asked, and those of `Task.unwritten`.
    seed : int
        Seed of the contexts.
    options : dict, optional
        Task options that differ from the checkpoint's, as `{"pairs": 8}`.
    progress : callable
        Wraps the list of batches, to show progress.

    Raises
    ------
    GradmemError
        When there are fewer than two samples, or the task has none.
    """
    spec = {**model.spec["task"], **(options or {})}
    task = build_task(spec)
    fitted, _, lengths = _examine(model, task, "valid", samples, seed, progress)
    flat = [(answer, kind == WRITTEN) for kind, answers in fitted.items() for answer in answers]
    about = {"task": spec, "split": "valid", "samples": samples, "seed": seed, "kinds": list(fitted)}
    written = np.array([own for _, own in flat])
    holds = min(lengths) // SHORTER, max(lengths)
    model.abstain = Abstain.fit([answer for answer, _ in flat], written, model.fingerprints["checkpoint"], holds, about)
    answers, right, _ = _examine(model, task, "test", samples, seed, progress)
    return Calibration(model.name, task.label, model.abstain, samples, seed, answers, right)


def _examine(
    model: MemoryModel, task: Task, split: Split, samples: int, seed: int, progress: Callable[..., Iterable[Any]]
) -> tuple[dict[str, list[Answer]], np.ndarray, list[int]]:
    """Answers to queries of every kind, whether each of the first kind is right, and the lengths of the contexts."""
    there = task.size(split)
    samples = samples if there is None else min(samples, there)
    if samples < 2:
        raise GradmemError("calibration needs at least 2 samples: queries are asked of other contexts")
    length = task.batch(split, 0, samples, seed).context.ids.shape[1]
    # A batch of one context would ask its own queries of itself.
    size = min(samples, max(2, model.method.backbone.tokens_at_once // length))
    starts = range(0, samples - samples % size if samples % size == 1 else samples, size)
    answers: dict[str, list[Answer]] = {}
    right: list[bool] = []
    lengths: list[int] = []
    for start in progress(list(starts), f"{task.label}, {split}"):
        batch = task.batch(split, start, min(size, samples - start), seed).to(model.device)
        lengths += batch.context.lengths.tolist()
        with torch.no_grad():
            memory = model.method.write(batch.context).memory
        for kind, asked in {WRITTEN: batch, **task.unwritten(batch)}.items():
            found = model.answer_ids(memory, asked.rows.tolist(), asked.prompts()) if len(asked.rows) else []
            answers.setdefault(kind, []).extend(found)
        wanted = [task.decode(labels[labels >= 0].tolist()) for labels in batch.labels]
        right += [a.text == text for a, text in zip(answers[WRITTEN][len(right) :], wanted, strict=True)]
    return answers, np.array(right), lengths


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
