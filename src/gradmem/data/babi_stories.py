"""Generated bAbI stories, qa1 to qa5: a small world, told two statements at a time.

The rules were inferred from the official training files, which they reproduce in vocabulary, sentence forms, lengths
and answers. Statements are drawn until one is possible; after every second one a question is asked if the last few
statements allow one, until there are five.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

ROOMS = ["bathroom", "bedroom", "garden", "hallway", "kitchen", "office"]
OBJECTS = ["apple", "football", "milk"]
PEOPLE = ["Daniel", "John", "Mary", "Sandra"]
GIVERS = ["Bill", "Fred", "Jeff", "Mary"]
VERBS = {
    "move": ["went to", "went back to", "moved to", "journeyed to", "travelled to"],
    "get": ["got", "took", "grabbed", "picked up"],
    "drop": ["dropped", "left", "discarded", "put down"],
    "give": ["gave", "handed", "passed"],
}
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}
QUESTIONS = 5
RECENT = 5
"""Questions are about something among this many last statements."""
THERE = 0.2
"""How often a statement about an object ends in "there", where the form is not fixed."""
OUTER_FIRST = 0.645
"""qa4: how often a statement is about the outer room ("the office is north of the middle one"), not the middle one."""


@dataclass
class Told:
    """A story so far, a question at this point, and its answer."""

    statements: list[str]
    question: str
    answer: str


@dataclass
class Event:
    """What happened: who, what kind, with which object (or to which room), and to whom it was given."""

    kind: str
    actor: str
    what: str
    to: str = ""


class World:
    """Actors who walk, take, drop and give; it knows what is true, and what has been told.

    Parameters
    ----------
    random : Random
    actors : list of str
    kinds : list of str
        What an actor may do; each is drawn as often as it is listed.
    always_there : bool
        Whether taking always ends in "there".
    """

    def __init__(self, random: Random, actors: list[str], kinds: list[str], always_there: bool = True) -> None:
        self.random, self.actors, self.kinds, self.always_there = random, actors, kinds, always_there
        self.room = {actor: random.choice(ROOMS) for actor in actors}
        self.told: dict[str, str] = {}
        self.lies = {thing: random.choice(ROOMS) for thing in OBJECTS}
        self.holder: dict[str, str] = {}
        self.path: dict[str, list[str]] = {}
        """Rooms that each object was carried to, since it was last taken."""
        self.dropped: dict[str, str] = {}
        """Rooms where objects were dropped, as far as they were told."""
        self.events: list[Event] = []
        self.statements: list[str] = []

    def step(self) -> None:
        """Let something happen, and tell it."""
        event = None
        while event is None:
            event = self._draw(self.random.choice(self.kinds), self.random.choice(self.actors))
        self._perform(event)
        self.events.append(event)
        self.statements.append(self._statement(event))

    def recent(self, kind: tuple[str, ...]) -> list[Event]:
        """The last few events that are of a kind."""
        return [event for event in self.events[-RECENT:] if event.kind in kind]

    def _draw(self, kind: str, actor: str) -> Event | None:
        """Draw something of a kind that the actor can do, or nothing."""
        choice = self.random.choice
        if kind == "move":
            room = choice(ROOMS)
            return Event(kind, actor, room) if room != self.room[actor] else None
        if kind == "get":
            things = [thing for thing, room in self.lies.items() if room == self.room[actor]]
        else:
            things = [thing for thing, holder in self.holder.items() if holder == actor]
        near = [other for other in self.actors if other != actor and self.room[other] == self.room[actor]]
        if not things or (kind == "give" and not near):
            return None
        return Event(kind, actor, choice(things), choice(near) if kind == "give" else "")

    def _perform(self, event: Event) -> None:
        actor, what = event.actor, event.what
        if event.kind == "move":
            self.room[actor] = self.told[actor] = what
            for thing, holder in self.holder.items():
                if holder == actor:
                    self.path[thing].append(what)
        elif event.kind == "get":
            del self.lies[what]
            self.holder[what], self.path[what] = actor, []
            self.dropped.pop(what, None)
        elif event.kind == "drop":
            del self.holder[what]
            self.lies[what] = self.room[actor]
            if actor in self.told:
                self.dropped[what] = self.told[actor]
        else:
            self.holder[what] = event.to

    def _statement(self, event: Event) -> str:
        verb = self.random.choice(VERBS[event.kind])
        if event.kind == "give":
            return f"{event.actor} {verb} the {event.what} to {event.to}."
        fixed = event.kind == "get" and self.always_there
        there = event.kind != "move" and (fixed or self.random.random() < THERE)
        return f"{event.actor} {verb} the {event.what}{' there' if there else ''}."


Ask = Callable[[World], tuple[str, str] | None]


def where_is_actor(world: World) -> tuple[str, str] | None:
    """qa1: someone who moved lately."""
    actor = world.random.choice(world.recent(("move",))).actor
    return f"Where is {actor}?", world.room[actor]


def where_is_object(world: World) -> tuple[str, str] | None:
    """qa2: an object taken lately and then carried somewhere, or dropped lately in a room that was told."""
    rooms = world.dropped | {thing: world.path[thing][-1] for thing in world.holder if world.path[thing]}
    known = [event.what for event in world.recent(("get", "drop")) if event.what in rooms]
    if not known:
        return None
    thing = world.random.choice(known)
    return f"Where is the {thing}?", rooms[thing]


def where_was_object(world: World) -> tuple[str, str] | None:
    """qa3: an object taken or dropped lately that was carried to at least two rooms; the room before one of these."""
    known = [event.what for event in world.recent(("get", "drop")) if len(world.path[event.what]) > 1]
    if not known:
        return None
    thing = world.random.choice(known)
    path = world.path[thing]
    last = [i for i in range(1, len(path)) if path[i] not in path[i + 1 :]]
    place = world.random.choice(last)
    return f"Where was the {thing} before the {path[place]}?", path[place - 1]


def who_gave(world: World) -> tuple[str, str] | None:
    """qa5: the last time that a lately given object was given; what, who, or to whom."""
    given = world.recent(("give",))
    if not given:
        return None
    thing = world.random.choice(given).what
    number, event = [(i, e) for i, e in enumerate(world.events) if e.kind == "give" and e.what == thing][-1]
    asked = world.random.choice(["object", "receiver", "giver"])
    # The same two may have exchanged something else since: then what was given has two answers.
    again = [e for e in world.events[number + 1 :] if (e.actor, e.to) == (event.actor, event.to)]
    if asked == "object" and not again:
        return f"What did {event.actor} give to {event.to}?", thing
    if asked == "receiver":
        forms = [f"Who received the {thing}?", f"Who did {event.actor} give the {thing} to?"]
        return world.random.choice(forms), event.to
    return world.random.choice([f"Who gave the {thing}?", f"Who gave the {thing} to {event.to}?"]), event.actor


def tell(world: World, ask: Ask) -> list[Told]:
    """Tell a story with five questions."""
    told: list[Told] = []
    while len(told) < QUESTIONS:
        world.step()
        world.step()
        found = ask(world)
        if found:
            told.append(Told(list(world.statements), *found))
    return told


def rooms_in_line(random: Random) -> list[Told]:
    """qa4: two rooms on either side of a third, one statement about each, and a question about one of them."""
    first, middle, last = random.sample(ROOMS, 3)
    direction = random.choice(list(OPPOSITE))
    sides = [(first, direction), (last, OPPOSITE[direction])]
    random.shuffle(sides)
    facts = [
        (outer, way, middle) if random.random() < OUTER_FIRST else (middle, OPPOSITE[way], outer)
        for outer, way in sides
    ]
    answer, way, other = random.choice(facts)
    question = random.choice([f"What is {way} of the {other}?", f"What is the {other} {OPPOSITE[way]} of?"])
    return [Told([f"The {a} is {direction} of the {b}." for a, direction, b in facts], question, answer)]


TASKS: dict[str, Callable[[Random], list[Told]]] = {
    "qa1": lambda random: tell(World(random, PEOPLE, ["move"]), where_is_actor),
    "qa2": lambda random: tell(World(random, PEOPLE, ["move", "get", "drop"]), where_is_object),
    "qa3": lambda random: tell(World(random, PEOPLE, ["move", "get", "drop"], False), where_was_object),
    "qa4": rooms_in_line,
    "qa5": lambda random: tell(World(random, GIVERS, ["move", "get", "drop", *["give"] * 4]), who_gave),
}
"""What can be generated: a story and its questions, from a source of random numbers."""
