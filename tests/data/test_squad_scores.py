"""Exact match and F1 by SQuAD's normalization, against values counted by hand."""

from __future__ import annotations

import pytest

from gradmem.data.squad_scores import exact_match_and_f1


@pytest.mark.parametrize(
    ("answer", "references", "scores"),
    [
        ("The  Dog!", ["a dog"], (1, 1)),
        ("a big dog", ["dog", "big cat"], (0, 2 / 3)),
        ("cat", ["dog"], (0, 0)),
        ("", [""], (1, 1)),
        ("", ["dog"], (0, 0)),
    ],
)
def test_the_best_reference_counts(answer: str, references: list[str], scores: tuple[float, float]) -> None:
    assert exact_match_and_f1(answer, references) == pytest.approx(scores)
