"""Paragraphs with their questions, cut and merged into contexts, and cloze questions on plain text."""

from __future__ import annotations

import random
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .sources import read_lines
from .squad_files import read_rows, read_titles

MAX_REPEATS = 200
"""How often the questions of an entry may repeat one question. More repeats are left out: they come from templates."""
NGRAM = 8
"""A training context may not share as many words in a row with a test file."""
Question = tuple[str, list[str]]
"""A question and its right answers."""
Window = tuple[str, list[Question]]
"""A context and its questions."""


@dataclass
class Document:
    """A text with its questions.

    Attributes
    ----------
    units : list of str
        The text in parts, such as sentences. A context holds whole parts.
    questions : list of tuple
        For each question: the unit it belongs to, or None if it belongs to the whole text; the question; its answers.
    """

    units: list[str]
    questions: list[tuple[int | None, str, list[str]]] = field(default_factory=list)


@dataclass
class Overlap:
    """Finds training texts that overlap with test files (decontamination).

    Attributes
    ----------
    ngrams : set of int
        Hashes of all runs of eight words in the test files.
    titles : set of str
        Titles of the test files.
    """

    ngrams: set[int]
    titles: set[str]

    @classmethod
    def with_files(cls, files: Iterable[Path]) -> Overlap:
        """Read the test files, which hold questions; see `read_rows`."""
        ngrams: set[int] = set()
        titles: set[str] = set()
        for file in files:
            contexts = {row[0] for row in read_rows(file)}
            ngrams.update(ngram for context in contexts for ngram in word_ngrams(_detokenize(context)))
            titles.update(filter(None, read_titles(file).values()))
        return cls(ngrams, titles)

    def has(self, text: str) -> bool:
        """Whether a text shares a run of eight words with the test files."""
        return not self.ngrams.isdisjoint(word_ngrams(text))


def word_ngrams(text: str) -> list[int]:
    """Hashes of the runs of eight words of a text, whatever their case and punctuation."""
    words = re.findall(r"\w+", text.lower())
    return [hash(tuple(words[at : at + NGRAM])) for at in range(len(words) - NGRAM + 1)]


def read_documents(file: Path, overlap: Overlap, notes: list[str]) -> Iterator[Document]:
    """Read the documents of a file, except those that have the title of a test file; `notes` says how many."""
    if file.suffix == ".txt":
        text = "\n".join(line for _, line in read_lines(file))
        yield Document([part for part in _sentences(_detokenize(text)) if not part.startswith(("=", " ="))])
        return
    paragraphs: dict[str, list[Question]] = {}
    for context, question, answers in read_rows(file):
        found = paragraphs.setdefault(context, [])
        found.append((_detokenize(question), [_detokenize(answer) for answer in answers]))
    titles = read_titles(file)
    left_out = 0
    for context, questions in paragraphs.items():
        if titles.get(context, "") in overlap.titles:
            left_out += 1
            continue
        yield Document(_sentences(_detokenize(context.strip())), [(None, *question) for question in questions])
    if left_out:
        notes.append(f"{left_out} paragraphs of {file.name} are left out: the test files have some of the same title")


def _sentences(text: str) -> list[str]:
    """Split a text after each sentence and each line; white space stays."""
    return [part for part in re.split(r"(?<=[.!?][\"')]\s)|(?<=[.!?]\s)|(?<=\n)", text) if part.strip()]


SPACED = [(r" ([,.;:!?%)\]]|n't\b|'s\b|'re\b|'ve\b|'ll\b|'d\b|'m\b|'(?= ))", r"\1"), (r"([(\[$]) ", r"\1")]
MARKS = [("`` ", '"'), (" ''", '"'), ("``", '"'), ("''", '"'), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")]


def _detokenize(text: str) -> str:
    """Remove the spaces between the tokens of a treebank, so that the text is as people write it."""
    if not re.search(r" [,.?]( |$)|``| 's | @", text):
        return text
    for mark, plain in MARKS:
        text = text.replace(mark, plain)
    for pattern, plain in SPACED:
        text = re.sub(pattern, plain, text)
    return text


def merge_documents(documents: list[Document]) -> Document:
    """Make one document of many short ones; each becomes a unit."""
    merged = Document([])
    for number, document in enumerate(documents):
        merged.units.append("".join(document.units).strip() + " ")
        merged.questions += [(number, question, answers) for _, question, answers in document.questions]
    return merged


def split_into_windows(document: Document, sizes: list[int], max_tokens: int, overlapping: bool) -> Iterator[Window]:
    """Cut a document into contexts of whole units.

    Parameters
    ----------
    document : Document
    sizes : list of int
        Tokens of each unit.
    max_tokens : int
        Most tokens of a context.
    overlapping : bool
        Whether a context begins at each unit, or each where the one before ends.
    """
    of_unit: dict[int | None, list[Question]] = {}
    for unit, question, answers in document.questions:
        of_unit.setdefault(unit, []).append((question, answers))
    whole = "".join(document.units)
    begin = 0
    while begin < len(sizes):
        end, tokens = begin, 0
        while end < len(sizes) and tokens + sizes[end] <= max_tokens:
            tokens, end = tokens + sizes[end], end + 1
        if end == len(sizes) and begin and not overlapping and of_unit.get(None):
            # The last context of a paragraph begins earlier, so that it is as long as the others.
            while begin and tokens + sizes[begin - 1] <= max_tokens:
                begin, tokens = begin - 1, tokens + sizes[begin - 1]
        if end > begin:
            text = "".join(document.units[begin:end]).strip()
            questions = [question for unit in range(begin, end) for question in of_unit.get(unit, [])]
            general = of_unit.get(None, [])
            complete = end - begin == len(sizes)
            questions += general if complete else [one for one in general if _only_in(text, one[1][0], whole)]
            times = Counter(question for question, _ in questions)
            questions = [one for one in questions if times[one[0]] == 1]
            if questions or not document.questions:
                yield text, questions
        begin = begin + 1 if overlapping or end == begin else end


def _only_in(part: str, answer: str, whole: str) -> bool:
    """Whether an answer occurs in a part of a text and nowhere else in it."""
    return answer in part and whole.count(answer) == part.count(answer)


def drop_repeats(documents: list[Document]) -> int:
    """Remove questions after their first `MAX_REPEATS` occurrences; return how many."""
    times: Counter[str] = Counter()
    before = sum(len(document.questions) for document in documents)
    for document in documents:
        for _, question, _ in document.questions:
            times[question] += 1
        document.questions = [one for one in document.questions if times[one[1]] <= MAX_REPEATS]
    return before - sum(len(document.questions) for document in documents)


def cloze_questions(text: str, count: int) -> list[Question]:
    """Make up to `count` questions from a text: a gap to fill, or words whose next words are asked for."""
    words = text.split()
    draw = random.Random(zlib.crc32(text.encode()))
    found: list[Question] = []
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
