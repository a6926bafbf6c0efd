"""Reports about people and places that do not exist: no model can have read what they say."""

from __future__ import annotations

import random
from collections.abc import Callable
from string import Formatter
from typing import TypeVar

from ..errors import require
from .paragraphs import Window

T = TypeVar("T")
FEWEST_WORDS, MOST_WORDS = 60, 3000
"""Words that a report may have: longer ones would run out of names."""
FACTS = [
    ("The code of the door to the {room} is {code}.", "What is the code of the door to the {room}?", "code"),
    ("The contract with {company} was signed by {person}.", "Who signed the contract with {company}?", "person"),
    ("{company} delivered the new boiler on {date}.", "When did {company} deliver the new boiler?", "date"),
    ("{person} paid {price} for a used {thing}.", "How much did {person} pay for a used {thing}?", "price"),
    (
        "The lift of the office in {place} was last inspected on {date}.",
        "When was the lift of the office in {place} last inspected?",
        "date",
    ),
    ("{person} was born in {place}.", "Where was {person} born?", "place"),
    ("There are {boxes} of spare parts in the {room}.", "How many boxes of spare parts are in the {room}?", "boxes"),
    (
        "The {thing} of {person} has the serial number {serial}.",
        "What is the serial number of the {thing} of {person}?",
        "serial",
    ),
    (
        "Whoever needs the {room} has to call extension {extension}.",
        "Which extension has to be called by those who need the {room}?",
        "extension",
    ),
    (
        "{person} keeps the spare key in a {colour} tin.",
        "What colour is the tin in which {person} keeps the spare key?",
        "colour",
    ),
    ("The night shift in {place} begins at {time}.", "At what time does the night shift in {place} begin?", "time"),
    ("The head of {company} is called {person}.", "What is the head of {company} called?", "person"),
    (
        "The paint for the {room} came from {company}.",
        "Which company sent the paint for the {room}?",
        "company",
    ),
    ("{person} works for the town as a {job}.", "What does {person} work as?", "job"),
    (
        "The rent of the warehouse in {place} is {price} a month.",
        "How much is the monthly rent of the warehouse in {place}?",
        "price",
    ),
    ("The old well in {place} is {depth} deep.", "How deep is the old well in {place}?", "depth"),
]
"""Sentences, each with the question that it answers and the part of it that is the answer."""
FILLERS = [
    "Nobody expected that so much would have to be decided within so short a time.",
    "The weather was mild for most of the week, and the roads were dry.",
    "Several people asked for a second meeting, which has not been arranged yet.",
    "As always, the minutes were read aloud before anything else was discussed.",
    "Some of the older papers could not be found and are still being looked for.",
    "The committee thanked everybody who had helped with the preparations.",
    "It was agreed that complaints should be made in writing from now on.",
    "There was some laughter when the projector failed for the third time.",
    "What happens next depends on how quickly the remaining forms are returned.",
    "A longer version of this report is kept in the archive and can be read there.",
    "Most of the repairs are finished, although the roof still leaks when it rains hard.",
    "Visitors are asked to leave their coats and umbrellas at the entrance.",
]
"""Sentences between the facts, which answer no question."""
FIRST = ["Vel", "Tor", "Mar", "Bren", "Ish", "Quil", "Hes", "Dra", "Lun", "Ost", "Pel", "Sath"]
FIRST_END = ["ka", "rick", "wen", "dis", "olt", "ara", "mina", "eth", "io", "una"]
LAST = ["Orman", "Brenk", "Talver", "Quist", "Hallo", "Drav", "Selm", "Miro", "Vant", "Kest", "Ulber", "Noor"]
LAST_END = ["der", "holt", "wick", "mere", "stad", "ovic", "lund", "ley", "gard", "sson"]
PLACE = ["Tarn", "Brim", "Ostel", "Kal", "Wend", "Fenna", "Harro", "Sild", "Mor", "Ibber"]
PLACE_END = ["holm", "wick", "ford", "stead", "mouth", "haven", "dale", "burg"]
TRADES = ["Lantern Works", "Mills", "Rope Company", "Glassworks", "Shipping", "Printers", "Foundry", "Tiles"]
WINGS = ["north", "south", "east", "west", "upper", "lower", "inner", "outer", "old", "new"]
ROOMS = ["archive", "workshop", "laundry", "kitchen", "library", "cellar", "laboratory", "studio", "chapel", "garage"]
THINGS = ["printer", "sewing machine", "bicycle", "telescope", "piano", "tractor", "generator", "camera"]
COLOURS = ["red", "green", "blue", "yellow", "purple", "brown", "white", "black", "grey", "silver", "golden", "pink"]
JOBS = ["gardener", "plumber", "baker", "beekeeper", "librarian", "teacher", "locksmith", "nurse", "judge", "welder"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October"]
MONTHS += ["November", "December"]


def made_up_texts(count: int, words: int = 200, seed: int = 1) -> list[Window]:
    """Make up reports, each with a question and the right answers for each of its facts.

    Parameters
    ----------
    count : int
        Reports.
    words : int
        Most words of a report; a few less if another sentence does not fit.
    seed : int
        Each seed gives other reports.

    Raises
    ------
    GradmemError
        If there are no reports, or they would be too short or too long.
    """
    require("contexts", count, count >= 1, "at least 1")
    good = FEWEST_WORDS <= words <= MOST_WORDS
    require("words of a made-up text", words, good, f"from {FEWEST_WORDS} to {MOST_WORDS}")
    return [_report(random.Random(f"{seed} {number}"), words) for number in range(count)]


def _report(draw: random.Random, words: int) -> Window:
    """Two facts, a sentence that says nothing, two facts, and so on."""
    values = _Values(draw)
    sentences = [f"Report of the town council of {values('place')[0]}."]
    left, questions = words - len(sentences[0].split()), []
    facts, fillers = _shuffled(draw, FACTS), _shuffled(draw, FILLERS)
    while True:
        facts, fillers = facts or _shuffled(draw, FACTS), fillers or _shuffled(draw, FILLERS)
        question = None
        if len(sentences) % 3:
            sentence, question = _fact(values, *facts.pop())
        else:
            sentence = fillers.pop()
        left -= len(sentence.split())
        if left < 0:
            break
        sentences.append(sentence)
        questions += [question] if question else []
    paragraphs = [" ".join(sentences[at : at + 6]) for at in range(0, len(sentences), 6)]
    draw.shuffle(questions)
    return "\n\n".join(paragraphs), questions


def _fact(values: _Values, sentence: str, question: str, answer: str) -> tuple[str, tuple[str, list[str]]]:
    """A sentence of a report, with the question that it answers."""
    found = {name: values(name) for _, name, _, _ in Formatter().parse(sentence) if name}
    said = {name: answers[0] for name, answers in found.items()}
    return sentence.format(**said), (question.format(**said), found[answer])


def _shuffled(draw: random.Random, items: list[T]) -> list[T]:
    return draw.sample(items, len(items))


class _Values:
    """Draws made-up names and numbers for one report; what a question names is drawn once only."""

    def __init__(self, draw: random.Random) -> None:
        self.draw, self.said = draw, set[str]()
        self.kinds: dict[str, Callable[[], list[str]]] = {
            "person": self._person,
            "place": lambda: [self._joined(PLACE, PLACE_END)],
            "company": lambda: [f"{self._joined(LAST, LAST_END)} {draw.choice(TRADES)}"],
            "room": lambda: [f"{draw.choice(WINGS)} {draw.choice(ROOMS)}"],
            "code": lambda: [str(draw.randint(1000, 9999))],
            "date": self._date,
            "price": self._price,
            "boxes": lambda: self._counted(12, 98, "boxes"),
            "depth": lambda: self._counted(11, 97, "metres", "meters"),
            "serial": lambda: [f"{draw.choice('BDFGKLMPRT')}{draw.choice('BDFGKLMPRT')}-{draw.randint(10000, 99999)}"],
            "extension": lambda: [str(draw.randint(210, 989))],
            "time": lambda: [f"{draw.randint(17, 23)}:{draw.randint(1, 11) * 5:02}"],
            "thing": lambda: [draw.choice(THINGS)],
            "colour": lambda: [draw.choice(COLOURS)],
            "job": lambda: [draw.choice(JOBS)],
        }

    def __call__(self, kind: str) -> list[str]:
        """A value of a kind as it stands in the text, followed by other right ways to say it."""
        found = self.kinds[kind]()
        while kind in ("person", "place", "company", "room") and found[0] in self.said:
            found = self.kinds[kind]()
        self.said.add(found[0])
        return found

    def _joined(self, starts: list[str], ends: list[str]) -> str:
        return self.draw.choice(starts) + self.draw.choice(ends)

    def _person(self) -> list[str]:
        last = self._joined(LAST, LAST_END)
        return [f"{self._joined(FIRST, FIRST_END)} {last}", last]

    def _date(self) -> list[str]:
        day, month, year = self.draw.randint(1, 28), self.draw.choice(MONTHS), self.draw.randint(2031, 2079)
        return [f"{day} {month} {year}", f"{month} {day}, {year}"]

    def _price(self) -> list[str]:
        amount = f"{self.draw.randint(1101, 9899):,}"
        return [f"{amount} euros", amount]

    def _counted(self, low: int, high: int, *units: str) -> list[str]:
        number = self.draw.randint(low, high)
        return [*(f"{number} {unit}" for unit in units), str(number)]
