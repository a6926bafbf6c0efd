"""Make reports.jsonl: questions about made-up reports, with the right answers and three wrong ones of the same kind."""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

from gradmem.data.made_up import FACTS, made_up_texts

REPORTS, WORDS = 4, 80
FORMS = [re.compile(re.sub(r"\\{\w+\\}", ".+", re.escape(question))) for _, question, _ in FACTS]
"""A pattern for each kind of question."""


def kind(question: str) -> str:
    """What a question asks for, such as a date."""
    return next(asked for form, (_, _, asked) in zip(FORMS, FACTS, strict=True) if form.fullmatch(question))


def lines() -> list[str]:
    """One JSON object for each question."""
    others: dict[str, list[str]] = {}
    for _, questions in made_up_texts(50, seed=2):
        for question, answers in questions:
            others.setdefault(kind(question), []).append(answers[0])
    draw, found = random.Random(0), []
    for context, questions in made_up_texts(REPORTS, WORDS):
        for question, answers in questions:
            wrong = sorted({other for other in others[kind(question)] if other not in answers})
            choices = draw.sample([answers[0], *draw.sample(wrong, 3)], 4)
            line = {"context": context, "question": question, "answers": answers, "choices": choices}
            found.append(json.dumps(line | {"right": choices.index(answers[0])}))
    return found


if __name__ == "__main__":
    Path(sys.argv[1]).write_text("\n".join(lines()) + "\n")
