"""Generated bAbI stories with questions that they answer, and questions that they do not: to learn when to abstain."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from random import Random

from . import babi_stories
from .babi_facts import QUESTIONS, Facts, match
from .babi_stories import EVERYBODY, EVERYWHERE, GIVERS, OBJECTS, OPPOSITE, PEOPLE

NAMES = {name.lower() for name in EVERYBODY}
WORLD = {*NAMES, *EVERYWHERE, *OBJECTS}
"""All people, rooms and things."""
FEW = {name.lower() for name in (*PEOPLE, *GIVERS)}
"""People of stories that are not crowded."""
CROWDED = 0.25
"""Share of crowded stories."""
CUT, CUT_LENGTH = 0.4, 6
"""Share of stories that are cut to their first statements, and the most statements that are left."""
MAX_STATEMENTS = 60
"""Most statements of a story."""
PER_KIND = 5
"""Most questions of each list of `Questions`."""


@dataclass
class Questions:
    """A story with questions in small letters, each with its answer; those without an answer have some word instead.

    Attributes
    ----------
    statements : list of str
        The story.
    answered : list of tuple of str
        Questions that the story answers.
    unnamed : list of tuple of str
        Questions about a person or a thing that is not in the story.
    untold : list of tuple of str
        Questions about people and things of the story that it does not answer.
    """

    statements: list[str]
    answered: list[tuple[str, str]]
    unnamed: list[tuple[str, str]]
    untold: list[tuple[str, str]]


def draw_questions(
    random: Random, tasks: Sequence[str], kinds: Collection[str], max_statements: int | None = None
) -> Questions:
    """Draw a story of one of the tasks, or the beginning of one, and questions of these kinds."""
    statements, people = _draw_story(random, tasks, max_statements or MAX_STATEMENTS)
    facts = Facts.of(one.lower().rstrip(".") for one in statements)
    answers = facts.answers()
    own = [question for question in answers if match(question, QUESTIONS, kinds)]
    others = [question for question in every_question(kinds) if question not in answers]
    untold = [question for question in others if WORLD & set(question.split()) <= facts.names]
    # Names that no story of this kind has would be too easy to recognize.
    unnamed = [one for one in others if one not in untold and not (NAMES - people) & set(one.split())]
    drawn = [
        [(question, answers.get(question, "nothing")) for question in _sample(random, some, PER_KIND)]
        for some in (own, unnamed, untold)
    ]
    return Questions(statements, *drawn)


def _draw_story(random: Random, tasks: Sequence[str], max_statements: int) -> tuple[list[str], set[str]]:
    """A story, and the people of its world."""
    while True:
        name, crowded = random.choice(tasks), random.random() < CROWDED
        if excerpts := babi_stories.TASKS[name](random, False, crowded, max_statements):
            statements = random.choice(excerpts).statements
            short = random.randint(1, min(CUT_LENGTH, len(statements)))
            return statements[: short if random.random() < CUT else None], NAMES if crowded else FEW


def every_question(kinds: Collection[str]) -> Iterator[str]:
    """All questions of these kinds about all people, rooms and things, in small letters."""
    people = [name.lower() for name in EVERYBODY]
    if "person" in kinds:
        yield from (f"where is {name}" for name in people)
    if "thing" in kinds:
        yield from (f"where is the {thing}" for thing in OBJECTS)
    if "before" in kinds:
        yield from (f"where was the {thing} before the {room}" for thing in OBJECTS for room in EVERYWHERE)
    if "line" in kinds:
        for way in OPPOSITE:
            for room in EVERYWHERE:
                yield from (f"what is {way} of the {room}", f"what is the {room} {way} of")
    if "gift" in kinds:
        yield from (f"what did {a} give to {b}" for a in people for b in people if a != b)
        for thing in OBJECTS:
            yield from (f"who gave the {thing}", f"who received the {thing}")
            yield from (f"who gave the {thing} to {name}" for name in people)
            yield from (f"who did {name} give the {thing} to" for name in people)


def _sample(random: Random, questions: list[str], count: int) -> list[str]:
    """Draw questions; each kind is equally likely, however many questions it has."""
    kinds: dict[str, list[str]] = {}
    for question in questions:
        found = match(question, QUESTIONS, QUESTIONS)
        assert found is not None, question
        kinds.setdefault(found[0], []).append(question)
    chosen: list[str] = []
    while kinds and len(chosen) < count:
        kind = random.choice(list(kinds))
        chosen.append(kinds[kind].pop(random.randrange(len(kinds[kind]))))
        kinds = {name: left for name, left in kinds.items() if left}
    return chosen
