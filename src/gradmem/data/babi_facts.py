"""What is true at the end of a bAbI story of qa1 to qa5: the forms of its sentences, and all questions it answers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from .babi_stories import EVERYBODY, EVERYWHERE, OBJECTS, OPPOSITE, VERBS, Event

MOVES = ("move", "get", "drop")
Kinds = Mapping[str, tuple[str, ...]]
STATEMENT_KINDS: Kinds = {"qa1": ("move",), "qa2": MOVES, "qa3": MOVES, "qa4": ("line",), "qa5": (*MOVES, "give")}
"""Kinds of statements in the stories of each task."""
QUESTION_KINDS: Kinds = {"qa1": ("person",), "qa2": ("thing",), "qa3": ("before",), "qa4": ("line",), "qa5": ("gift",)}
"""Kinds of questions that each task asks."""
EXAMPLE_STATEMENTS = {
    "move": "Mary went to the kitchen",
    "get": "Mary got the milk there",
    "drop": "Mary dropped the milk",
    "give": "Mary gave the milk to Fred",
    "line": "The office is north of the kitchen",
}
"""A statement of each kind, for messages."""
EXAMPLE_QUESTIONS = {
    "person": "Where is Mary?",
    "thing": "Where is the milk?",
    "before": "Where was the milk before the kitchen?",
    "line": "What is north of the kitchen?",
    "gift": "Who gave the milk to Fred?",
}
"""A question of each kind, for messages."""


def kinds_of(tasks: Collection[str], kinds: Kinds) -> tuple[str, ...] | None:
    """Return the kinds of sentences of these tasks, each once; None if those of one task are unknown."""
    return None if set(tasks) - set(kinds) else tuple(dict.fromkeys(kind for task in tasks for kind in kinds[task]))


def _one(name: str, words: Iterable[str]) -> str:
    """Pattern that matches one of these words, as a named group."""
    return f"(?P<{name}>" + "|".join(word.lower() for word in words) + ")"


_ACTOR, _TO, _THING = _one("actor", EVERYBODY), _one("to", EVERYBODY), _one("what", OBJECTS)
_OUTER, _WAY, _OTHER = _one("actor", EVERYWHERE), _one("what", OPPOSITE), _one("to", EVERYWHERE)
STATEMENTS = {
    "move": [f"{_ACTOR} {_one('verb', VERBS['move'])} the {_one('what', EVERYWHERE)}"],
    "get": [f"{_ACTOR} {_one('verb', VERBS['get'])} the {_THING}(?: there)?"],
    "drop": [f"{_ACTOR} {_one('verb', VERBS['drop'])} the {_THING}(?: there)?"],
    "give": [f"{_ACTOR} {_one('verb', VERBS['give'])} the {_THING} to {_TO}"],
    "line": [f"the {_OUTER} is {_WAY} of the {_OTHER}"],
}
"""Patterns of the statements of each kind, in small letters, without the full stop."""
QUESTIONS = {
    "person": [f"where is {_ACTOR}"],
    "thing": [f"where is the {_THING}"],
    "before": [f"where was the {_THING} before the {_OTHER}"],
    "line": [f"what is {_WAY} of the {_OTHER}", f"what is the {_OTHER} {_WAY} of"],
    "gift": [
        f"what did {_ACTOR} give to {_TO}",
        f"who gave the {_THING}(?: to {_TO})?",
        f"who received the {_THING}",
        f"who did {_ACTOR} give the {_THING} to",
    ],
}
"""Patterns of the questions of each kind, in small letters, without the question mark."""


def match(words: str, patterns: dict[str, list[str]], kinds: Collection[str]) -> tuple[str, dict[str, str]] | None:
    """Return the kind of a sentence in small letters and its named parts; None if it is of none of these kinds."""
    for kind in kinds:
        for pattern in patterns[kind]:
            if found := re.fullmatch(pattern, words):
                return kind, found.groupdict()
    return None


@dataclass
class Facts:
    """What is true at the end of a story, as far as its statements say.

    Attributes
    ----------
    room : dict of str
        Room of each person and each thing.
    visited : dict of list of str
        Rooms in which each thing is known to have been, in order.
    holder : dict of str
        Who has each thing.
    lines, gifts : list of Event
        Which room is beside which, and what was given.
    names : set of str
        People, things and rooms in the story.
    """

    room: dict[str, str] = field(default_factory=dict)
    visited: dict[str, list[str]] = field(default_factory=dict)
    holder: dict[str, str] = field(default_factory=dict)
    lines: list[Event] = field(default_factory=list)
    gifts: list[Event] = field(default_factory=list)
    names: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, statements: Iterable[str]) -> Facts:
        """Read statements in small letters, each of a known form."""
        facts = cls()
        for words in statements:
            found = match(words, STATEMENTS, STATEMENTS)
            assert found is not None, words
            kind, parts = found
            facts._add(Event(kind, parts["actor"], parts["what"], parts.get("to") or ""))
        return facts

    def _add(self, event: Event) -> None:
        actor, what = event.actor, event.what
        self.names |= {actor, what, event.to}
        if event.kind == "line":
            self.lines.append(event)
        elif event.kind == "move":
            self.room[actor] = what
            for thing, holder in self.holder.items():
                if holder == actor:
                    self._put(thing, what)
        else:
            if actor in self.room:
                self._put(what, self.room[actor])
            elif self.holder.get(what) != actor:
                self.room.pop(what, None)  # it is with somebody whose room is unknown
            self.holder[what] = event.to or actor
            if event.kind == "drop":
                del self.holder[what]
            elif event.kind == "give":
                self.gifts.append(event)

    def _put(self, thing: str, room: str) -> None:
        self.room[thing] = room
        if self.visited.setdefault(thing, [])[-1:] != [room]:
            self.visited[thing].append(room)

    def answers(self) -> dict[str, str]:
        """Return every question that the story answers, in small letters, with its answer at the end of the story."""
        found = {f"where is {'the ' if one in OBJECTS else ''}{one}": room for one, room in self.room.items()}
        for thing, rooms in self.visited.items():
            found |= {f"where was the {thing} before the {b}": a for a, b in pairwise(rooms)}
        for line in self.lines:
            for a, way, b in ((line.actor, line.what, line.to), (line.to, OPPOSITE[line.what], line.actor)):
                found |= {f"what is {way} of the {b}": a, f"what is the {a} {way} of": b}
        for gift in self.gifts:
            giver, thing, to = gift.actor, gift.what, gift.to
            found |= {f"what did {giver} give to {to}": thing, f"who did {giver} give the {thing} to": to}
            found |= {f"who gave the {thing} to {to}": giver, f"who gave the {thing}": giver}
            found[f"who received the {thing}"] = to
        return found
