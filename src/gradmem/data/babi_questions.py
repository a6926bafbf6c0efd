"""Stories of qa1 to qa5 to learn from when to abstain: with questions that they answer, and others."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from random import Random

from . import babi_stories
from .babi_reading import QUESTIONS, Reading, match
from .babi_stories import EVERYBODY, EVERYWHERE, GIVERS, OBJECTS, OPPOSITE, PEOPLE

NAMES = {name.lower() for name in EVERYBODY}
WORLD = {*NAMES, *EVERYWHERE, *OBJECTS}
"""People, rooms and things that sentences name."""
FEW = {name.lower() for name in (*PEOPLE, *GIVERS)}
"""People of stories that are not crowded."""
CROWDED, CUT, SHORT, LONGEST = 0.25, 0.4, 6, 60
"""How many stories are crowded; how many are no more than the first of their statements, up to so many; and the most
statements of a story."""
EACH = 5
"""Questions of each kind to a story."""


@dataclass
class Asked:
    """A story with questions in small letters, each with its answer or, where it has none, some word."""

    statements: list[str]
    answered: list[tuple[str, str]]
    unnamed: list[tuple[str, str]]
    """About somebody or something that the story does not name."""
    untold: list[tuple[str, str]]
    """About what it names, without telling this of it."""


def ask(random: Random, tasks: Sequence[str], kinds: Collection[str], longest: int | None = None) -> Asked:
    """Tell a story of one of the tasks, or the beginning of one, and ask questions of these kinds."""
    statements, people = _tell(random, tasks, longest or LONGEST)
    read = Reading.of(one.lower().rstrip(".") for one in statements)
    answers = read.answers()
    own = [question for question in answers if match(question, QUESTIONS, kinds)]
    others = [question for question in every_question(kinds) if question not in answers]
    untold = [question for question in others if WORLD & set(question.split()) <= read.names]
    # Names from other stories would be too easy to tell.
    unnamed = [one for one in others if one not in untold and not (NAMES - people) & set(one.split())]
    drawn = [
        [(question, answers.get(question, "nothing")) for question in _drawn(random, some, EACH)]
        for some in (own, unnamed, untold)
    ]
    return Asked(statements, *drawn)


def _tell(random: Random, tasks: Sequence[str], longest: int) -> tuple[list[str], set[str]]:
    """A story, and the people of its world."""
    while True:
        name, crowded = random.choice(tasks), random.random() < CROWDED
        if told := babi_stories.TASKS[name](random, False, crowded, longest):
            statements = random.choice(told).statements
            short = random.randint(1, min(SHORT, len(statements)))
            return statements[: short if random.random() < CUT else None], NAMES if crowded else FEW


def every_question(kinds: Collection[str]) -> Iterator[str]:
    """All questions of these kinds that can be asked in this world, in small letters."""
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


def _drawn(random: Random, questions: list[str], count: int) -> list[str]:
    """So many of the questions, each kind as likely as the others, however many questions it has."""
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
