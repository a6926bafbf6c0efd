"""The rows of the board: what every writer keeps of what a model answers with the whole text, with intervals.

No model is needed here, so that programs with another version of transformers make the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.squad_scores import exact_match_and_f1
from ..errors import GradmemError
from .result import break_even, interval

FULL, NONE, SWAPPED = "full", "none", "swapped"
"""Rows that are always there: the whole cache, no text, and the memory of the next text."""
ALONG = 20
"""Most tokens of an answer along which fidelity is measured, and tokens of the answer that is timed."""
TIMED = 8
"""Texts of which the first question is timed."""
Key = tuple[str, float]
"""A writer, and its budget: a fraction of the whole cache up to 1, or above 1 a number of vectors."""
Row = dict[str, Any]
SCORES = ("exact_match", "f1", "f1_full", "kl", "agreement")


@dataclass(frozen=True)
class Outcome:
    """How one text was answered from one memory.

    Attributes
    ----------
    answers : list of str
        One for each question.
    exact_match, f1 : float
        By the references, mean over questions.
    f1_full : float
        F1 of the answers against those with the whole text, mean over questions.
    kl : float
        KL divergence of the model with the whole text to the model with the memory, along the answers of the first:
        nats per token.
    agreement : float
        How often the likeliest token is the same there.
    bytes : int
        Bytes of the memory.
    write_seconds : float
    query_seconds : float, optional
        Seconds of one question with an answer of fixed length; None if it was not timed for this text.
    """

    answers: list[str]
    exact_match: float
    f1: float
    f1_full: float
    kl: float
    agreement: float
    bytes: int
    write_seconds: float
    query_seconds: float | None = None

    @classmethod
    def of(
        cls, answers: Sequence[str], references: Sequence[Sequence[str]], full: Sequence[str], **measured: Any
    ) -> Outcome:
        """Score generated answers.

        Parameters
        ----------
        answers : sequence of str
        references : sequence of sequence of str
            The right answers to each question.
        full : sequence of str
            The answers with the whole text.
        **measured
            The other attributes.
        """
        pairs = [exact_match_and_f1(*pair) for pair in zip(answers, references, strict=True)]
        same = [exact_match_and_f1(one, [other])[1] for one, other in zip(answers, full, strict=True)]
        exact_match, f1 = np.mean(pairs, axis=0).tolist()
        return cls(list(answers), exact_match=exact_match, f1=f1, f1_full=float(np.mean(same)), **measured)


def rows_of(outcomes: Mapping[Key, Sequence[Outcome]], about: Row) -> list[Row]:
    """Make one row for each writer and budget.

    Scores are means over texts, with 95 % intervals by bootstrap over texts. `gap_closed` is the part of the KL
    divergence without the text (`none`) that the memory removes. The budget of vectors is the part of the bytes of the
    whole cache that they take.

    Parameters
    ----------
    outcomes : dict of sequence of Outcome
        By writer and budget, in the same order of texts; `full` and `none` are among them.
    about : dict
        Further columns, the same in every row.
    """
    without = np.array([one.kl for one in _only(outcomes, NONE)])
    if len(without) < 2:
        raise GradmemError("the board needs at least 2 texts: one of its rows swaps memories between texts")
    full = _only(outcomes, FULL)
    whole = _mean([one.bytes for one in full])
    again = _mean([one.write_seconds for one in full]) + _mean(_timed(full))
    return [
        {"writer": writer, "budget": budget, **_row(writer, own, without, again), **about}
        for (writer, given), own in outcomes.items()
        for budget in [given if given <= 1 else round(_mean([one.bytes for one in own]) / whole, 4)]
    ]


def _row(writer: str, own: Sequence[Outcome], without: np.ndarray, again: float) -> Row:
    write, query = _mean([one.write_seconds for one in own]), _mean(_timed(own))
    queries = break_even(write, query, 0.0, again)
    scores = {name: np.array([getattr(one, name) for one in own]) for name in SCORES}
    both = np.stack([scores["kl"], without], 1)
    return {
        "bytes": round(_mean([one.bytes for one in own])),
        **{name: _mean(values) for name, values in scores.items()},
        "gap_closed": _gap_closed(both),
        "write_seconds": write,
        "query_ms": 1000 * query,
        "break_even": int(queries) if writer not in (NONE, SWAPPED) and math.isfinite(queries) else None,
        "questions": sum(len(one.answers) for one in own),
        "contexts": len(own),
        **{f"{name}_ci95": interval(values) for name, values in scores.items()},
        "gap_closed_ci95": interval(both, statistic=_gap_closed),
    }


def _gap_closed(divergences: np.ndarray) -> float:
    """Part of the mean of the second column that the first one does not have; 0 if there is nothing to close."""
    own, without = divergences.mean(0).tolist()
    return 1 - own / without if without else 0.0


def _only(outcomes: Mapping[Key, Sequence[Outcome]], writer: str) -> Sequence[Outcome]:
    return next(own for (name, _), own in outcomes.items() if name == writer)


def _timed(own: Sequence[Outcome]) -> list[float]:
    return [one.query_seconds for one in own if one.query_seconds is not None]


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values))
