"""An independent solver of bAbI stories: it knows sentences, and nothing of how they were made."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import pairwise
from random import Random

import torch

from gradmem.batch import Batch
from gradmem.data.babi_stories import TASKS as GENERATED
from gradmem.data.babi_stories import Excerpt
from gradmem.tasks.babi import Babi
from helpers import DATA

OFFICIAL = DATA / "babi_v1.1_en"


SMALL = """1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Where is John? \thallway\t2
5 Mary went to the office.
6 Where is Mary? \toffice\t5
1 John moved to the garden.
2 Where is John? \tgarden\t1
"""


ROOM = "bathroom|bedroom|garden|hallway|kitchen|office|cinema|park|school"


THING, PERSON = "apple|football|milk", "[A-Z][a-z]+"


Story = list[Excerpt]


def answers(statements: list[str], question: str) -> list[str]:
    """All answers that the story supports, the one about what happened last at the end."""
    if match := re.fullmatch(rf"Where is ({PERSON})\?", question):
        return [m[1] for s in statements if (m := re.fullmatch(rf"{match[1]} .* to the ({ROOM})\.", s))]
    if match := re.fullmatch(rf"Where is the ({THING})\?", question):
        return visited(statements, match[1])
    if match := re.fullmatch(rf"Where was the ({THING}) before the ({ROOM})\?", question):
        rooms = visited(statements, match[1])
        return [a for a, b in pairwise(rooms) if b == match[2]]
    if match := re.fullmatch(r"What is (\w+) of the (\w+)\?", question):
        return [a for a, way, b in directions(statements) if (way, b) == (match[1], match[2])]
    if match := re.fullmatch(r"What is the (\w+) (\w+) of\?", question):
        return [b for a, way, b in directions(statements) if (a, way) == (match[1], match[2])]
    gifts = [m.groups() for s in statements if (m := re.fullmatch(rf"(\w+) \w+ the ({THING}) to (\w+)\.", s))]
    forms = {
        rf"What did (?P<a>{PERSON}) give to (?P<b>{PERSON})\?": 1,
        rf"Who received the (?P<o>{THING})\?": 2,
        rf"Who did (?P<a>{PERSON}) give the (?P<o>{THING}) to\?": 2,
        rf"Who gave the (?P<o>{THING})\?": 0,
        rf"Who gave the (?P<o>{THING}) to (?P<b>{PERSON})\?": 0,
    }
    for form, wanted in forms.items():
        if match := re.fullmatch(form, question):
            asked = match.groupdict()
            return [g[wanted] for g in gifts if all(g["aob".index(key)] == value for key, value in asked.items())]
    raise AssertionError(f"unknown question: {question}")


def visited(statements: list[str], thing: str) -> list[str]:
    """Rooms that an object was in, one after the other, as far as they can be known."""
    room: dict[str, str] = {}
    holder, rooms = None, []
    for statement in statements:
        person = statement.split()[0]
        if match := re.search(rf" to the ({ROOM})\.", statement):
            room[person] = match[1]
        elif f"the {thing}" in statement:
            took = re.search(r" (got|took|grabbed|picked up) ", statement)
            assert bool(took) == (holder is None), "an object is taken when nobody has it, and dropped by who has it"
            assert took or holder == person
            assert not (took and rooms and person in room) or rooms[-1] == room[person], "taken where it is not"
            holder = person if took else None
        here = room.get(holder or "")
        if here and (not rooms or rooms[-1] != here):
            rooms.append(here)
        if f"the {thing}" in statement and holder is None and person in room and rooms[-1:] != [room[person]]:
            rooms.append(room[person])
    return rooms


def directions(statements: list[str]) -> list[tuple[str, str, str]]:
    """What is told of rooms, said both ways round."""
    opposite = {"north": "south", "south": "north", "east": "west", "west": "east"}
    told = [re.fullmatch(r"The (\w+) is (\w+) of the (\w+)\.", s).groups() for s in statements]
    return told + [(b, opposite[way], a) for a, way, b in told]


def official(task: str, split: str) -> list[Story]:
    """The stories of an official file, parsed anew."""
    (file,) = OFFICIAL.glob(f"{task}_*_{split}.txt")
    stories: list[Story] = []
    statements: list[str] = []
    for line in file.read_text().splitlines():
        number, _, rest = line.partition(" ")
        if number == "1":
            stories.append([])
            statements = []
        if "\t" in rest:
            question, answer, _ = rest.split("\t")
            stories[-1].append(Excerpt(list(statements), [(question.strip(), answer)]))
        else:
            statements.append(rest)
    return stories


def generated(task: str, count: int, seed: int = 0, every: bool = False, crowded: bool = False) -> list[Story]:
    random = Random(seed)
    return [GENERATED[task](random, every, crowded, math.inf) for _ in range(count)]


def asked(stories: list[Story]) -> Iterator[tuple[list[str], str, str]]:
    """All questions of stories, each with what was told before it."""
    for told in (one for story in stories for one in story):
        for question, answer in told.questions:
            yield told.statements, question, answer


def same(one: Batch, other: Batch) -> bool:
    pairs = [(one.context.ids, other.context.ids), (one.queries.ids, other.queries.ids), (one.labels, other.labels)]
    return all(torch.equal(a, b) for a, b in pairs)


def rows(task: Babi, batch: Batch) -> list[tuple[str, str]]:
    """Contexts and their queries as text, without pads."""
    decode, told = task.tokenizer.decode, contexts(task, batch)
    queries = [decode(ids[mask]) for ids, mask in zip(batch.queries.ids, batch.queries.mask, strict=True)]
    return [(told[int(row)], query) for row, query in zip(batch.rows, queries, strict=True)]


def contexts(task: Babi, batch: Batch) -> list[str]:
    """Contexts as text, without pads."""
    return [task.tokenizer.decode(ids[mask]) for ids, mask in zip(batch.context.ids, batch.context.mask, strict=True)]
