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
SHORTEST = 8
"""Fewest words of such a sentence."""
LONGEST = 32
"""Most tokens of a question that the model asks itself."""
SHARED = 0.3
"""Least part of the words of a user's questions that occur in the text or in the questions above."""
WORD = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]|[^\W\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]+")
"""A word; of languages that are written without spaces, a character."""


def check_language(questions: Sequence[str], text: str) -> None:
    """Refuse questions of which next to no word occurs in the text.

    Raises
    ------
    GradmemError
        If they seem to be in another language.
    """
    known = set(WORD.findall(" ".join((text, *STOCK, *HELD_OUT)).lower()))
    asked = WORD.findall(" ".join(questions).lower())
    if sum(word in known for word in asked) < SHARED * max(1, len(asked)):
        raise GradmemError("the questions share next to no words with the text: ask in the language of the text")
