"""Questions that can be asked of any text: nothing of a text's own questions is known when it is written."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..errors import GradmemError

STOCK = (
    "Who is mentioned in the text?",
    "What is the text about?",
    "Where does it take place?",
    "When did it happen?",
    "How many are there?",
    "Why did it happen?",
    "What happened first?",
    "What happened last?",
    "Which names are mentioned?",
    "Which numbers are mentioned?",
    "What was the result?",
    "Who did what?",
)
"""Questions whose answers a memory is fitted to."""
HELD_OUT = (
    "What is the most important fact in the text?",
    "Which places are mentioned?",
    "Which dates or times are mentioned?",
    "Who or what is the main subject?",
)
"""Questions by which a memory is measured, and to which it is not fitted."""
REPEAT = "Repeat the text."
"""What is asked for the text itself."""
ANSWER = 24
"""Most tokens of an answer to one of these questions."""
ASK = (
    "Write one short question about a person or a name in the text.",
    "Write one short question about a number, a date or a time in the text.",
    "Write one short question about a place or a thing in the text.",
    "Write one short question that begins with why or how and that the text answers.",
)
"""What the model is told in order to ask itself, in several styles."""
CLOZE = 'Which words follow "{}" in the text?'
"""A question that is cut from a sentence of the text."""
LONGEST = 32
"""Most tokens of a question that the model asks itself."""
SHARED = 0.3
"""Least part of the words of a user's questions that occur in the text or in the questions above."""
LONG_WORD = 12
"""Mean letters of the words of a text that is written without spaces."""


def check_language(questions: Sequence[str], text: str) -> None:
    """Refuse questions of which next to no word occurs in the text.

    Raises
    ------
    GradmemError
        If they seem to be in another language.
    """
    words = re.findall(r"\w+", text.lower())
    if sum(map(len, words)) > LONG_WORD * len(words):  # Chinese, for example: compare characters
        known, asked = set(text), [one for question in questions for one in question if one.isalnum()]
    else:
        known = {*words, *re.findall(r"\w+", " ".join((*STOCK, *HELD_OUT)).lower())}
        asked = [word for question in questions for word in re.findall(r"\w+", question.lower())]
    if sum(one in known for one in asked) < SHARED * max(1, len(asked)):
        raise GradmemError("the questions share next to no words with the text: ask in the language of the text")
