"""Texts with questions from a file, and which of them are asked."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from ..errors import GradmemError, refused, require
from .paragraphs import Question, Window
from .squad_files import read_rows


def read_texts(path: Path) -> list[Window]:
    """Read the texts of a file with their questions and right answers, in the order of the file.

    Parameters
    ----------
    path : Path
        JSON lines (`.jsonl`) of one question each (`context`, `question`, `answers`) or of one context each with a list
        `qas`; or JSON in SQuAD's official form.

    Raises
    ------
    GradmemError
        If the file cannot be read, has another form, or has no question.
    """
    found: dict[str, list[Question]] = {}
    with refused(f"cannot read {path}"):
        for context, question, answers in read_rows(path):
            found.setdefault(context, []).append((question, answers))
    if not found:
        raise GradmemError(f"{path} has no questions: each line needs `context`, `question` and `answers`")
    return list(found.items())


def choose_texts(
    texts: Sequence[Window], count: int, questions: int, max_words: int | None = None, seed: int | None = 1
) -> list[Window]:
    """Choose texts, with the first few questions of each.

    Parameters
    ----------
    texts : sequence of Window
    count : int
        Most texts.
    questions : int
        Most questions of a text.
    max_words : int, optional
        Most words of a text; longer ones are left out.
    seed : int, optional
        Decides the order; None takes the texts as they come.

    Raises
    ------
    GradmemError
        If a number is below 1, or all texts are too long.
    """
    for name, number in (("contexts", count), ("questions", questions), ("max_words", max_words)):
        require(name, number, number is None or number >= 1, "at least 1")
    short = [one for one in texts if max_words is None or len(one[0].split()) <= max_words]
    if not short:
        raise GradmemError(f"all {len(texts)} texts have more than {max_words} words: raise max_words")
    if seed is not None:
        random.Random(seed).shuffle(short)
    return [(context, asked[:questions]) for context, asked in short[:count]]
