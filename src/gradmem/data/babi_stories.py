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
EVERYWHERE = [*ROOMS, "cinema", "park", "school"]
NAMES = """
Antoine Bernhard Bill Brian Daniel Emily Fred Gertrude Greg Jason Jeff Jessica John Julie Julius Lily Mary Sandra Sumit
Winona Yann
"""
EVERYBODY = NAMES.split()
KINDS = [[name.lower() for name in names] for names in (ROOMS, OBJECTS, PEOPLE, GIVERS)]
"""What a question can be about, by kind, in small letters."""
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
    """A story so far, and what is asked at this point: questions with answers."""

    statements: list[str]
    questions: list[tuple[str, str]]


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
    crowded : bool
        Everybody acts, everywhere.
    """

    def __init__(
        self, random: Random, actors: list[str], kinds: list[str], always_there: bool = True, crowded: bool = False
    ) -> None:
        self.random, self.kinds, self.always_there = random, kinds, always_there
        self.actors, self.rooms = (EVERYBODY, EVERYWHERE) if crowded else (actors, ROOMS)
        self.room = {actor: random.choice(self.rooms) for actor in self.actors}
        self.told: dict[str, str] = {}
        self.lies = {thing: random.choice(self.rooms) for thing in OBJECTS}
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
            room = choice(self.rooms)
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


Story = Callable[[Random, bool, bool, float], "list[Told]"]
Known = dict[str, list[list[tuple[str, str]]]]
"""About each person or object: for each thing that can be asked, its wordings, with the answer."""


def where_is_actor(world: World) -> Known:
    """qa1: where somebody is."""
    return {actor: [[(f"Where is {actor}?", room)]] for actor, room in world.told.items()}


def where_is_object(world: World) -> Known:
    """qa2: where an object is that was taken and then carried somewhere, or dropped in a room that was told."""
    rooms = world.dropped | {thing: world.path[thing][-1] for thing in world.holder if world.path[thing]}
    return {thing: [[(f"Where is the {thing}?", room)]] for thing, room in rooms.items()}


def where_was_object(world: World) -> Known:
    """qa3: an object that was carried to at least two rooms; the room before one of these."""
    known: Known = {}
    for thing, path in world.path.items():
        last = [i for i in range(1, len(path)) if path[i] not in path[i + 1 :]]
        if last:
            known[thing] = [[(f"Where was the {thing} before the {path[i]}?", path[i - 1])] for i in last]
    return known


def who_gave(world: World) -> Known:
    """qa5: the last time that an object was given; what, who, or to whom."""
    known: Known = {}
    gifts = [event for event in world.events if event.kind == "give"]
    for number, event in enumerate(gifts):
        thing, giver, receiver = event.what, event.actor, event.to
        given = [(f"What did {giver} give to {receiver}?", thing)]
        givers = [(f"Who gave the {thing}?", giver), (f"Who gave the {thing} to {receiver}?", giver)]
        receivers = [(f"Who received the {thing}?", receiver), (f"Who did {giver} give the {thing} to?", receiver)]
        # The same two may have exchanged something else since: then what was given has two answers.
        again = any((later.actor, later.to) == (giver, receiver) for later in gifts[number + 1 :])
        known[thing] = [givers if again else given, receivers, givers]
    return known


def tell(world: World, kinds: tuple[str, ...], known: Callable[[World], Known], every: bool, most: float) -> list[Told]:
    """Tell a story that asks five times: one question about something recent, or every question that has an answer.

    It breaks off at `most` statements: short stories of a crowded world are rare, and long ones take long to tell.
    """
    told: list[Told] = []
    while len(told) < QUESTIONS and len(world.statements) + 2 <= most:
        world.step()
        world.step()
        answers = known(world)
        recent = [event.actor if event.kind == "move" else event.what for event in world.recent(kinds)]
        subjects = [subject for subject in recent if subject in answers]
        if subjects:
            choice = world.random.choice
            drawn = [choice(choice(answers[choice(subjects)]))]
            told.append(Told(list(world.statements), _all(answers) if every else drawn))
    return told


def _all(answers: Known) -> list[tuple[str, str]]:
    """Every question once."""
    return list(dict.fromkeys(question for about in answers.values() for forms in about for question in forms))


def rooms_in_line(random: Random, every: bool, crowded: bool, most: float) -> list[Told]:
    """qa4: two rooms on either side of a third, one statement about each, and a question about one of them."""
    first, middle, last = random.sample(EVERYWHERE if crowded else ROOMS, 3)
    direction = random.choice(list(OPPOSITE))
    sides = [(first, direction), (last, OPPOSITE[direction])]
    random.shuffle(sides)
    facts = [
        (outer, way, middle) if random.random() < OUTER_FIRST else (middle, OPPOSITE[way], outer)
        for outer, way in sides
    ]
    about = [
        [(f"What is {way} of the {other}?", answer), (f"What is the {other} {OPPOSITE[way]} of?", answer)]
        for answer, way, other in facts
    ]
    drawn = [random.choice(random.choice(about))]
    return [Told([f"The {a} is {way} of the {b}." for a, way, b in facts], [*about[0], *about[1]] if every else drawn)]


def teller(
    actors: list[str], actions: list[str], kinds: tuple[str, ...], known: Callable[[World], Known], there: bool = True
) -> Story:
    """What tells of these actors and actions, and asks about the last of some kinds."""

    def story(random: Random, every: bool, crowded: bool, most: float) -> list[Told]:
        return tell(World(random, actors, actions, there, crowded), kinds, known, every, most)

    return story


MOVES = ["move", "get", "drop"]
TASKS: dict[str, Story] = {
    "qa1": teller(PEOPLE, ["move"], ("move",), where_is_actor),
    "qa2": teller(PEOPLE, MOVES, ("get", "drop"), where_is_object),
    "qa3": teller(PEOPLE, MOVES, ("get", "drop"), where_was_object, there=False),
    "qa4": rooms_in_line,
    "qa5": teller(GIVERS, [*MOVES, *["give"] * 4], ("give",), who_gave),
}
"""What can be generated: a story, from a source of random numbers, whether to ask everything, whether everybody acts
everywhere instead of the few of the official files, and the most statements."""
