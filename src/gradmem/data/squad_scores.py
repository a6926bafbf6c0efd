"""Exact match and F1 of an answer, as SQuAD defines them."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import GradmemError


def exact_match_and_f1(answer: str, references: Sequence[str]) -> tuple[float, float]:
    """Compare an answer with right answers: the best over them, each from 0 to 1.

    Case, punctuation, articles and spaces do not count.

    Parameters
    ----------
    answer : str
    references : sequence of str
        Right answers, at least one.

    Raises
    ------
    GradmemError
        If torchmetrics is not installed.
    """
    try:
        from torchmetrics.functional.text import squad
    except ImportError as error:
        raise GradmemError("scoring answers needs one more package: pip install 'gradmem[squad]'") from error
    guess = {"prediction_text": answer, "id": "0"}
    truth = {"answers": {"text": list(references), "answer_start": [0] * len(references)}, "id": "0"}
    scores = squad([guess], [truth])
    return float(scores["exact_match"]) / 100, float(scores["f1"]) / 100
