"""Paragraphs with their questions from files of many forms, cut and joined into contexts; text asked for its words."""

from __future__ import annotations

import random
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..data.sources import read_lines
from .squad import read_rows, read_titles

REPEATS = 200
"""How often the same question is asked in an entry: more are left out, as they come from templates."""
GRAM = 8
"""Words in a row that training contexts do not share with the files they are kept apart from."""
Window = tuple[str, list[tuple[str, list[str]]]]
"""A context, and its questions with their answers."""


@dataclass
class Document:
    """A text with its questions and their answers; where it is cut, at the ends of its units."""

    units: list[str]
    asked: list[tuple[int | None, str, list[str]]] = field(default_factory=list)
    """Unit that a question belongs to, if it is one; question; answers."""


def documents_of(file: Path, apart: Apart, notes: list[str]) -> Iterator[Document]:
    """The documents of a file, but for those whose title is one of a test file."""
    if file.suffix == ".txt":
        text = "\n".join(line for _, line in read_lines(file))
        yield Document([part for part in _sentences(_unspaced(text)) if not part.startswith(("=", " ="))])
        return
    paragraphs: dict[str, list[tuple[str, list[str]]]] = {}
    for context, question, answers in read_rows(file):
        asked = paragraphs.setdefault(context, [])
        asked.append((_unspaced(question), [_unspaced(answer) for answer in answers]))
    titles = read_titles(file)
    known = 0
    for context, questions in paragraphs.items():
        if titles.get(context, "") in apart.titles:
            known += 1
            continue
        yield Document(_sentences(_unspaced(context.strip())), [(None, *question) for question in questions])
    if known:
        notes.append(f"{known} paragraphs of {file.name} are left out: the test files have some of the same title")


def _sentences(text: str) -> list[str]:
    """Parts of a text that end with a sentence or a line, white space included."""
    return [part for part in re.split(r"(?<=[.!?][\"')]\s)|(?<=[.!?]\s)|(?<=\n)", text) if part.strip()]


SPACED = [(r" ([,.;:!?%)\]]|n't\b|'s\b|'re\b|'ve\b|'ll\b|'d\b|'m\b|'(?= ))", r"\1"), (r"([(\[$]) ", r"\1")]
MARKS = [("`` ", '"'), (" ''", '"'), ("``", '"'), ("''", '"'), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")]


def _unspaced(text: str) -> str:
    """Text as people write it, where a treebank's tokens stand apart."""
    if not re.search(r" [,.?]( |$)|``| 's | @", text):
        return text
    for mark, plain in MARKS:
        text = text.replace(mark, plain)
    for pattern, plain in SPACED:
        text = re.sub(pattern, plain, text)
    return text


def joined(documents: list[Document]) -> Document:
    """Neighbouring short documents as one, whose units they are."""
    joined = Document([])
    for number, document in enumerate(documents):
        joined.units.append("".join(document.units).strip() + " ")
        joined.asked += [(number, question, answers) for _, question, answers in document.asked]
    return joined


def windows_of(document: Document, sizes: list[int], longest: int, everywhere: bool) -> Iterator[Window]:
    """Contexts of whole units, of up to so many tokens: one after the other, or one from every unit on."""
    of_unit: dict[int | None, list[tuple[str, list[str]]]] = {}
    for unit, question, answers in document.asked:
        of_unit.setdefault(unit, []).append((question, answers))
    whole = "".join(document.units)
    begin = 0
    while begin < len(sizes):
        end, tokens = begin, 0
        while end < len(sizes) and tokens + sizes[end] <= longest:
            tokens, end = tokens + sizes[end], end + 1
        if end == len(sizes) and begin and not everywhere and of_unit.get(None):
            # What is left at the end of a paragraph is filled up from before.
            while begin and tokens + sizes[begin - 1] <= longest:
                begin, tokens = begin - 1, tokens + sizes[begin - 1]
        if end > begin:
            text = "".join(document.units[begin:end]).strip()
            asked = [question for unit in range(begin, end) for question in of_unit.get(unit, [])]
            own = of_unit.get(None, [])
            asked += own if end - begin == len(sizes) else [one for one in own if _only_here(one[1][0], text, whole)]
            times = Counter(question for question, _ in asked)
            asked = [one for one in asked if times[one[0]] == 1]
            if asked or not document.asked:
                yield text, asked
        begin = begin + 1 if everywhere or end == begin else end


def _only_here(answer: str, text: str, whole: str) -> bool:
    """Whether an answer stands in a part of a text, and nowhere else."""
    return answer in text and whole.count(answer) == text.count(answer)


def cap(documents: list[Document]) -> int:
    """Take questions out that are asked too often, as those of templates are; return how many."""
    times: Counter[str] = Counter()
    before = sum(len(document.asked) for document in documents)
    for document in documents:
        for _, question, _ in document.asked:
            times[question] += 1
        document.asked = [asked for asked in document.asked if times[asked[1]] <= REPEATS]
    return before - sum(len(document.asked) for document in documents)


def gaps_in(text: str, count: int) -> list[tuple[str, list[str]]]:
    """Questions that a text asks itself: words with a gap, and words of which the next ones are wanted."""
    words = text.split()
    draw = random.Random(zlib.crc32(text.encode()))
    found: list[tuple[str, list[str]]] = []
    for _ in range(4 * count if len(words) >= 16 else 0):
        at, follow = draw.randrange(6, len(words) - 4), draw.random() < 0.5
        size = draw.randint(3, 5) if follow else draw.randint(1, 3)
        end = next((i + 1 for i in range(at, at + size) if i + 1 >= len(words) or words[i][-1] in ".,;:!?|"), at + size)
        before, answer, after = words[at - 6 : at], words[at:end], words[end : end + 4]
        plain = " ".join(answer).strip(" .,;:!?\"'()|-")
        telling = any(len(word) > 3 or not word[0].islower() for word in answer)
        if len(found) < count and plain and telling and "<unk>" not in plain:
            gap = f"{' '.join(before)} ___ {' '.join(after)}"
            found.append((f'Which words follow "{" ".join(before[1:])}"?' if follow else gap, [plain]))
    return found


@dataclass
class Apart:
    """What training contexts must not share with the files of tests.

    Attributes
    ----------
    grams : set of int
        Hashes of all their runs of eight words.
    titles : set of str
        Their titles.
    """

    grams: set[int]
    titles: set[str]

    @classmethod
    def read(cls, files: Iterable[Path]) -> Apart:
        """Take them from files of questions."""
        grams: set[int] = set()
        titles: set[str] = set()
        for file in files:
            grams.update(
                gram for context in {row[0] for row in read_rows(file)} for gram in word_grams(_unspaced(context))
            )
            titles.update(filter(None, read_titles(file).values()))
        return cls(grams, titles)

    def meets(self, text: str) -> bool:
        """Whether a text shares a run of words with them."""
        return not self.grams.isdisjoint(word_grams(text))


def word_grams(text: str) -> list[int]:
    """Hashes of the runs of eight words of a text, whatever their case and punctuation."""
    words = re.findall(r"\w+", text.lower())
    return [hash(tuple(words[at : at + GRAM])) for at in range(len(words) - GRAM + 1)]
