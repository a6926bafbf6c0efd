"""Generated bAbI stories for qa1 to qa5.

The rules were inferred from the official training files, whose vocabulary, sentence forms, lengths and answers they
reproduce. A story grows by two statements at a time. After each two it asks a question, if one about the last few
statements is possible; after five questions it ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from ..errors import GradmemError

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
"""Questions of a story."""
RECENT = 5
"""A question is about something in as many last statements."""
THERE = 0.2
"""Share of statements about an object that end in "there", where the form is not fixed."""
OUTER_FIRST = 0.645
"""qa4: share of statements with an outer room as subject, not the middle one."""


@dataclass
class Excerpt:
    """The beginning of a story, and the questions at this point with their answers."""

    statements: list[str]
    questions: list[tuple[str, str]]


@dataclass
class Event:
    """Something that a statement says.

    Attributes
    ----------
    kind : {"move", "get", "drop", "give", "line"}
    actor : str
        A person; for "line", a room.
    what : str
        An object; for "move", a room; for "line", a direction.
    to : str
        For "give", the person who receives it; for "line", the other room.
    """

    kind: str
    actor: str
    what: str
    to: str = ""


class World:
    """People who move, take, drop and give: what is true, and what the statements say of it.

    Parameters
    ----------
    random : Random
    actors : list of str
    kinds : list of str
        Kinds of events; a kind that is listed twice is twice as likely.
    always_there : bool
        Whether each statement about taking ends in "there".
    crowded : bool
        Whether all people act, in all rooms; `actors` is then not used.
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
        """Rooms that each object was carried to since it was last taken."""
        self.dropped: dict[str, str] = {}
        """Rooms where objects were dropped, as far as the statements say."""
        self.events: list[Event] = []
        self.statements: list[str] = []

    def step(self) -> None:
        """Add an event and its statement."""
        event = None
        while event is None:
            event = self._draw(self.random.choice(self.kinds), self.random.choice(self.actors))
        self._perform(event)
        self.events.append(event)
        self.statements.append(self._statement(event))

    def recent(self, kind: tuple[str, ...]) -> list[Event]:
        """Return those of the last `RECENT` events that are of one of these kinds."""
        return [event for event in self.events[-RECENT:] if event.kind in kind]

    def _draw(self, kind: str, actor: str) -> Event | None:
        """Draw an event of a kind; None if the actor cannot do it."""
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


StoryMaker = Callable[[Random, bool, bool, float], "list[Excerpt]"]
Known = dict[str, list[list[tuple[str, str]]]]
"""For each person or object: questions with answers, in groups whose questions mean the same."""


def where_is_actor(world: World) -> Known:
    """qa1: where somebody is."""
    return {actor: [[(f"Where is {actor}?", room)]] for actor, room in world.told.items()}


def where_is_object(world: World) -> Known:
    """qa2: where an object is that was taken and then carried somewhere, or dropped in a known room."""
    rooms = world.dropped | {thing: world.path[thing][-1] for thing in world.holder if world.path[thing]}
    return {thing: [[(f"Where is the {thing}?", room)]] for thing, room in rooms.items()}


def where_was_object(world: World) -> Known:
    """qa3: where an object was before it was carried to a room."""
    known: Known = {}
    for thing, path in world.path.items():
        last = [i for i in range(1, len(path)) if path[i] not in path[i + 1 :]]
        if last:
            known[thing] = [[(f"Where was the {thing} before the {path[i]}?", path[i - 1])] for i in last]
    return known


def who_gave(world: World) -> Known:
    """qa5: about the last time that an object was given: what, by whom, or to whom."""
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


def generate(
    world: World, kinds: tuple[str, ...], known: Callable[[World], Known], ask_all: bool, max_statements: float
) -> list[Excerpt]:
    """Generate a story that asks at `QUESTIONS` points.

    Parameters
    ----------
    world : World
    kinds : tuple of str
        A question is about the last few events of these kinds.
    known : callable
        Finds what can be asked.
    ask_all : bool
        Whether each point asks everything that has an answer, or one question about something recent.
    max_statements : float
        The story ends at as many statements: crowded worlds seldom have short stories, and long ones take long.
    """
    excerpts: list[Excerpt] = []
    while len(excerpts) < QUESTIONS and len(world.statements) + 2 <= max_statements:
        world.step()
        world.step()
        answers = known(world)
        recent = [event.actor if event.kind == "move" else event.what for event in world.recent(kinds)]
        subjects = [subject for subject in recent if subject in answers]
        if subjects:
            choice = world.random.choice
            drawn = [choice(choice(answers[choice(subjects)]))]
            excerpts.append(Excerpt(list(world.statements), _all(answers) if ask_all else drawn))
    return excerpts


def _all(answers: Known) -> list[tuple[str, str]]:
    """Every question once."""
    return list(dict.fromkeys(question for about in answers.values() for forms in about for question in forms))


def rooms_in_line(random: Random, ask_all: bool, crowded: bool, max_statements: float) -> list[Excerpt]:
    """qa4: two rooms on opposite sides of a third, a statement about each, and a question about one of them."""
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
    return [
        Excerpt([f"The {a} is {way} of the {b}." for a, way, b in facts], [*about[0], *about[1]] if ask_all else drawn)
    ]


def story_maker(
    actors: list[str], actions: list[str], kinds: tuple[str, ...], known: Callable[[World], Known], there: bool = True
) -> StoryMaker:
    """Build what makes the stories of a task: its actors, its actions, and the kinds of events that it asks about."""

    def make(random: Random, ask_all: bool, crowded: bool, max_statements: float) -> list[Excerpt]:
        return generate(World(random, actors, actions, there, crowded), kinds, known, ask_all, max_statements)

    return make


MOVES = ["move", "get", "drop"]
TASKS: dict[str, StoryMaker] = {
    "qa1": story_maker(PEOPLE, ["move"], ("move",), where_is_actor),
    "qa2": story_maker(PEOPLE, MOVES, ("get", "drop"), where_is_object),
    "qa3": story_maker(PEOPLE, MOVES, ("get", "drop"), where_was_object, there=False),
    "qa4": rooms_in_line,
    "qa5": story_maker(GIVERS, [*MOVES, *["give"] * 4], ("give",), who_gave),
}
"""What makes the stories of a task. Arguments: a source of random numbers; whether to ask everything that has an
answer; whether the world is crowded, with all people in all rooms instead of the few of the official files; the most
statements."""
MAX_TRIES = 5000
"""After as many stories without a short excerpt, none is expected."""


def draw_excerpts(
    task: str, random: Random, count: int, *, ask_all: bool, crowded: bool, max_statements: int | None
) -> list[Excerpt]:
    """Draw excerpts of generated stories, in random order.

    Parameters
    ----------
    task : str
    random : Random
    count : int
        Number of excerpts.
    ask_all : bool
        Whether to ask everything that has an answer.
    crowded : bool
        Whether all people act, in all rooms.
    max_statements : int, optional
        Most statements of an excerpt.

    Raises
    ------
    GradmemError
        If the task cannot be generated, or has no excerpt of so few statements.
    """
    if task not in TASKS:
        known = ", ".join(TASKS)
        raise GradmemError(f"{task} cannot be generated ({known} can): give `data`, a directory, and `generated: 0`")
    excerpts, stories = list[Excerpt](), 0
    while len(excerpts) < count:
        if stories == MAX_TRIES and not excerpts:
            raise GradmemError(
                f"no question of {task} comes within {max_statements} statements: raise `max_statements`"
            )
        excerpts += TASKS[task](random, ask_all, crowded, max_statements or math.inf)
        stories += 1
    del excerpts[count:]
    random.shuffle(excerpts)
    return excerpts
