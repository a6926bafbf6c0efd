"""bAbI question answering (Weston et al., arXiv 1502.05698): qa1 to qa20 from files, qa1 to qa5 generated too."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import lru_cache
from itertools import takewhile
from operator import itemgetter
from pathlib import Path
from random import Random
from typing import Any

from torch import Tensor

from ..batch import Batch
from ..data import (
    Query,
    Sample,
    Samples,
    babi_questions,
    babi_reading,
    babi_stories,
    cached,
    collate,
    digest_files,
    split_indices,
)
from ..data.babi_files import NUMBER, QUESTION, WORDS, hub_lines, read_stories, word_tokenizer
from ..data.babi_reading import ASKED, EXAMPLES, EXAMPLES_ASKED, QUESTIONS, STATEMENTS, TOLD, Reading
from ..data.babi_stories import Told
from ..data.sources import find_file, held_out, hub_rows, is_hub, read_lines
from ..errors import GradmemError, unknown
from ..pretrained import digest_tokenizer, pretrained_tokenizer
from .base import WRITTEN, FileTask, Split

NAMES = [name.lower() for name in babi_stories.EVERYBODY]
Kinds = tuple[str, ...] | None
"""Kinds of sentences; None where they are not known."""
TASKS = [f"qa{number}" for number in range(1, 21)]
VALID = 10
"""One in so many training stories is held out for validation."""
LONGEST = "football,apple,milk"
"""The answer with most tokens."""
BLOCK = 1024
"""Samples of a task generated at once."""
LONG = 5000
"""Stories without a short context, after which none is to be expected."""


class Babi(FileTask):
    """Stories in sentences; questions about the story so far, answered in a word or a short list.

    A context is all that was told before a question; questions at the same point share it.

    Parameters
    ----------
    tasks : str, int, or list of these
        Which of qa1 to qa20, as "qa1,qa4" or [1, 4].
    data : str, optional
        Directory with the official files, or a data set of the hub that is laid out as facebook/babi_qa. Training and
        validation take the train files (a tenth of their stories is held out), test takes the test files. By
        default stories are generated, which qa1 to qa5 can be.
    generated : float
        With `data`: the part of the training samples that is generated, 0 to 1.
    max_context : int, optional
        Most tokens of a context: of longer stories the oldest statements are left out, which is counted.
    tokenizer : str, optional
        Hub name, directory or GGUF file of a pretrained tokenizer, for a pretrained backbone: stories, questions and
        answers are then spelled as in the files, names always with capitals.
        By default every word is a token, in small letters.
    ask_all : bool
        Generated training stories ask everything that has an answer at this point, which teaches several times as
        much about each memory, instead of the one question that the official files ask.
    max_statements : int, optional
        Only generated contexts of at most so many statements, for curricula that begin with short stories; at least 2.
    crowded : bool
        Generated training stories have 21 people and nine places instead of four and six: who is where is then harder
        to guess, so a model learns sooner to remember it.
    """

    def __init__(
        self,
        tasks: str | int | list[str | int] = "qa1",
        data: str | None = None,
        generated: float = 0.0,
        max_context: int | None = None,
        tokenizer: str | None = None,
        ask_all: bool = False,
        max_statements: int | None = None,
        crowded: bool = False,
    ) -> None:
        super().__init__()
        self.tasks, self.data = _names(tasks), data
        if not 0 <= generated <= 1:
            raise GradmemError(f"generated must be from 0 to 1, not {generated}")
        if max_context is not None and max_context < 16:
            raise GradmemError(f"max_context must be at least 16, not {max_context}")
        if max_statements is not None and max_statements < 2:
            raise GradmemError(f"max_statements must be at least 2, not {max_statements}")
        self.generated = generated if data else 1.0
        self.ask_all, self.max_statements, self.crowded = ask_all, max_statements, crowded
        self.max_context = max_context
        self._tells, self._asks = _kinds(TOLD, self.tasks), _kinds(ASKED, self.tasks)
        self.cased = tokenizer is not None
        self.tokenizer = pretrained_tokenizer(tokenizer) if tokenizer else word_tokenizer()
        self._ids = lru_cache(maxsize=65536)(self._make_ids)
        self.answer_length = max(len(self.encode(f" {answer}")) for answer in (*WORDS, *NAMES, LONGEST)) + 1
        self._block = lru_cache(maxsize=8)(self._make_block)

    @property
    def label(self) -> str:
        """The tasks' numbers."""
        return ",".join(self.tasks)

    def variants(self) -> list[dict[str, Any]]:
        """Each task is measured separately."""
        return [{"tasks": name} for name in self.tasks]

    def source(self, split: Split) -> str:
        """Generated, or the data."""
        share = self._share(split)
        return "generated" if share == 1 else f"{self.data}, {share:.0%} generated" if share else str(self.data)

    def size(self, split: Split) -> int | None:
        """Contexts in a split; None where some are generated."""
        return None if self._share(split) else super().size(split)

    def notes(self, split: Split) -> list[str]:
        """What was cut, and which test stories training has too."""
        share, notes = self._share(split), []
        if share and self.max_context:
            for name in self.tasks:
                notes += self._cuts(f"generated contexts of {name}", self._told(name, split, 0, 0))
        if share < 1:
            notes += super().notes(split)
        if split == "test" and not share:
            try:
                notes += self.repeated()
            except GradmemError as error:
                notes.append(f"test contexts are not compared with those of training: {error}")
        return notes

    def batch(self, split: Split, start: int, size: int, seed: int = 0) -> Batch:
        """Samples of a split; see `Task.batch`. Generated ones stand evenly between those from files."""
        share, chosen = self._share(split), []
        for number in range(start, start + size):
            before = int(number * share)
            if int((number + 1) * share) > before:
                chosen.append(self._generated(split, before, seed))
            else:
                samples = self.samples(split)
                chosen.append(samples[int(split_indices(split, number - before, 1, len(samples), seed)[0])])
        return collate(chosen, self.pad_id)

    def load(self, split: Split) -> Samples:
        """Read the tasks' files, one task after the other.

        Within a task stand the first contexts of all stories before the second ones, so that neighbours, which
        evaluation swaps, tell of different worlds.
        """
        data = str(self.data)
        about: dict[str, Any] = {"task": "babi", "split": split, "max_context": self.max_context, "held_out": VALID}
        about |= {"tokenizer": digest_tokenizer(self.tokenizer)}
        if is_hub(data):
            about |= {"hub": data, "tasks": self.tasks}
        else:
            about |= {"files": digest_files(self._file(name, split) for name in self.tasks)}

        def make() -> Samples:
            asked = [one for name in self.tasks for one in self._read(name, split)]
            return Samples.build(map(self._sample, asked), self._cuts(f"{split} contexts", asked))

        return cached(about, make)

    def repeated(self) -> list[str]:
        """For each task: how many test contexts, and contexts with questions, training files have word for word."""
        found = []
        for name in self.tasks:
            known = [one for split in ("train", "valid") for one in self._read(name, split)]
            contexts = {tuple(one.statements) for one in known}
            asked = {(tuple(one.statements), question) for one in known for question in one.questions}
            test = self._read(name, "test")
            same = sum(tuple(one.statements) in contexts for one in test)
            questions = [(tuple(one.statements), question) for one in test for question in one.questions]
            found.append(
                f"{name}: {same} of {len(test)} test contexts occur word for word in the training files, and "
                f"{sum(question in asked for question in questions)} of {len(questions)} with the same question"
            )
        return found

    # Text

    def may_end(self, ids: Tensor) -> Tensor:
        """After whole statements."""
        return ids == self._ids("mary.")[-1]

    def context_text(self, text: str) -> str:
        """Accept sentences in any case and punctuation, or lines of the official format, whose questions are left out.

        Raises
        ------
        GradmemError
            With the number of the line, when a question stands among the statements, or a sentence is of no form that
            the tasks have.
        """
        told: list[str] = []
        for number, line in enumerate(text.splitlines(), 1):
            if not QUESTION.fullmatch(line):
                told += self._statements(line, f"line {number}")
        lines = [babi_reading.match(one, STATEMENTS, ["line"]) is not None for one in told]
        if self._tells is not None and any(lines) and not all(lines):
            raise GradmemError(
                "rooms that lie beside each other and people who act are stories of their own: write two"
            )
        return " ".join(f"{self._spelled(words)}." for words in told)

    def _statements(self, line: str, where: str) -> list[str]:
        """The statements of a line, in small letters and without punctuation."""
        found = []
        for sentence in re.findall(r"[^.!?]*[.!?]+|[^.!?]+$", line):
            words = " ".join(self._words(re.sub(f"^{NUMBER}", "", sentence)))
            if "?" in sentence:
                raise GradmemError(f"{where}: '{sentence.strip()}' is no statement: ask it of the memory, as a query")
            if not words and not sentence.strip():
                continue
            if not words or not self._knows(words, STATEMENTS, self._tells):
                raise GradmemError(
                    f"{where}: '{sentence.strip()}' is no sentence of its stories, which are like "
                    + self._like(EXAMPLES, self._tells)
                )
            found.append(words)
        return found

    def query_text(self, text: str) -> str:
        """Accept a question in any case, with or without its question mark, or a line of the official format.

        Raises
        ------
        GradmemError
            When it is of no form that the tasks ask.
        """
        official = QUESTION.fullmatch(text)
        question = official[1] if official else text
        words = " ".join(self._words(re.sub(f"^{NUMBER}", "", question)))
        if words and not self._knows(words, QUESTIONS, self._asks):
            raise GradmemError(
                f"'{text.strip()}' is no question that it knows; ask " + self._like(EXAMPLES_ASKED, self._asks)
            )
        return f"{self._spelled(words)}?" if words else ""

    def _knows(self, words: str, patterns: dict[str, list[str]], kinds: Kinds) -> bool:
        """Whether a sentence has a form of these kinds. One with unknown words is refused later, with these."""
        unknown = self.tokenizer.unk_token_id is not None and self.tokenizer.unk_token_id in self.encode(words)
        return kinds is None or unknown or babi_reading.match(words, patterns, kinds) is not None

    def _like(self, examples: dict[str, str], kinds: Kinds) -> str:
        return ", ".join(f"'{examples[kind]}'" for kind in kinds or ()) or "those of its tasks"

    def answer_text(self, text: str) -> str:
        """Names with a capital letter, lists as "apple,milk"."""
        words = [word.capitalize() if word in NAMES else word for word in text.split()]
        return " ".join(words).replace(" , ", ",")

    def examples(self, text: str) -> list[tuple[str, str]]:
        """All that can be asked at the end of the story; of qa6 to qa20 the official questions that stand there."""
        if self._tells is None or self._asks is None:
            asked = [(QUESTION.fullmatch(line), line) for line in text.splitlines() if line.strip()]
            last = list(takewhile(itemgetter(0), reversed(asked)))
            return [(found[1].strip(), found[2].strip()) for found, _ in reversed(last) if found]
        told = [sentence.strip().lower() for sentence in self.context_text(text).split(".") if sentence]
        if not all(babi_reading.match(one, STATEMENTS, self._tells) for one in told):
            return []  # words that nobody knows
        return [
            (self._as_asked(question), self.answer_text(answer))
            for question, answer in Reading.of(told).answers().items()
            if babi_reading.match(question, QUESTIONS, self._asks)
        ]

    def _as_asked(self, question: str) -> str:
        """As people write a question."""
        words = self.answer_text(question)
        return f"{words[0].upper()}{words[1:]}?"

    def example(self, seed: int = 0) -> tuple[str, list[tuple[str, str]]] | None:
        """A generated story with all that can be asked at its end, where one of the tasks can be generated."""
        if not (tasks := [name for name in self.tasks if name in babi_stories.TASKS]):
            return None
        random = Random(f"example {seed}")
        told = babi_stories.TASKS[random.choice(tasks)](random, True, False, math.inf)[-1]
        return " ".join(told.statements), told.questions

    def unanswerable(self, batch: Batch) -> dict[str, Batch]:
        """The questions, asked of somebody or something of the same world that the story does not mention.

        Questions to which no such change can be made are left out: a story that names all people is a clean example
        of nothing that is missing.
        """
        contexts = [ids[mask].tolist() for ids, mask in zip(batch.context.ids, batch.context.mask, strict=True)]
        stories = [set(self._words(self.text(ids))) for ids in contexts]
        samples = [Sample(ids, []) for ids in contexts]
        for number, (prompt, labels, row) in enumerate(zip(batch.prompts(), batch.labels, batch.rows, strict=True)):
            question = self._absent(self.text(prompt), stories[int(row)], number)
            if question is not None:
                ids = self.encode(f"{self._spelled(question)}?")
                samples[int(row)].queries.append(Query([*ids, *labels[labels >= 0].tolist()], len(ids)))
        return {"of what is not mentioned": collate(samples, self.pad_id).to(batch.rows.device)}

    def calibration(self, split: Split, start: int, size: int, seed: int = 0) -> dict[str, Batch]:
        """Generated stories of every length, of the few people of bAbI or of all; asked for all that can be asked.

        What they do not answer is about somebody or something that they do not name, or name without telling that.
        """
        if self._tells is None or self._asks is None:
            return super().calibration(split, start, size, seed)
        kinds: dict[str, list[Sample]] = {WRITTEN: [], "of what is not named": [], "of what is not told": []}
        for number in range(start, start + size):
            random = Random(f"calibration {split} {seed} {number}")
            asked = babi_questions.ask(random, self.tasks, self._asks, self.max_statements)
            context = self.encode(" ".join(self._kept(Told(asked.statements, []))))
            for kind, questions in zip(kinds, (asked.answered, asked.unnamed, asked.untold), strict=True):
                kinds[kind].append(Sample(context, [self._query(*one) for one in questions]))
        return {kind: collate(samples, self.pad_id) for kind, samples in kinds.items()}

    def _absent(self, question: str, story: set[str], number: int) -> str | None:
        """The question with one name exchanged for one of the same kind that the story has not."""
        for word in self._words(question):
            kinds = [kind for kind in babi_stories.KINDS if word in kind]
            kind = max(kinds, key=lambda kind: len(story & set(kind)), default=[])
            if absent := [name for name in kind if name not in story]:
                return re.sub(rf"\b{word}\b", absent[number % len(absent)], question, flags=re.IGNORECASE)
        return None

    def _words(self, text: str) -> list[str]:
        """Words without punctuation, in small letters; symbols that no text has stay, and will not be known."""
        return re.findall(r"[\w']+|[^\w\s.,;:!?\"()-]+", text.lower())

    def _spelled(self, sentence: str) -> str:
        """Words without punctuation, in small letters; for pretrained tokenizers names and the first have capitals."""
        words = self._words(sentence)
        if self.cased:
            words = [word.capitalize() if not i or word in NAMES else word for i, word in enumerate(words)]
        return " ".join(words)

    # Samples

    def _share(self, split: Split) -> float:
        """The part of a split that is generated."""
        return self.generated if split == "train" or self.data is None else 0.0

    def _generated(self, split: Split, number: int, seed: int) -> Sample:
        """Sample `number` of the endless generated ones; tasks take turns."""
        turn, task = divmod(number, len(self.tasks))
        return self._block(self.tasks[task], split, seed, turn // BLOCK)[turn % BLOCK]

    def _make_block(self, task: str, split: Split, seed: int, block: int) -> list[Sample]:
        return [self._sample(one) for one in self._told(task, split, seed, block)]

    def _told(self, task: str, split: Split, seed: int, block: int) -> list[Told]:
        if task not in babi_stories.TASKS:
            known = ", ".join(babi_stories.TASKS)
            raise GradmemError(
                f"{task} cannot be generated ({known} can): give `data`, a directory, and `generated: 0`"
            )
        random = Random(f"{task} {split} {seed} {block}")
        train, told, stories = split == "train", list[Told](), 0
        most = self.max_statements or math.inf
        while len(told) < BLOCK:
            if stories == LONG and not told:
                raise GradmemError(f"no question of {task} comes within {most} statements: raise `max_statements`")
            told += babi_stories.TASKS[task](random, train and self.ask_all, train and self.crowded, most)
            stories += 1
        del told[BLOCK:]
        random.shuffle(told)
        return told

    def _sample(self, asked: Told) -> Sample:
        queries = []
        for question, answer in asked.questions:
            queries.append(self._query(question, answer))
        return Sample(self.encode(" ".join(self._kept(asked))), queries)

    def _query(self, question: str, answer: str) -> Query:
        prompt, target = self.target(question, answer)
        return Query([*prompt, *target], len(prompt))

    def target(self, query: str, answer: str) -> tuple[list[int], list[int]]:
        """Tokens of a question of whatever form, and of its answer."""
        return self.encode_pair(f"{self._spelled(query)}?", f" {answer}")

    def _kept(self, asked: Told) -> list[str]:
        """The statements that `max_context` leaves."""
        kept = asked.statements
        while self.max_context is not None and len(kept) > 1 and self._length(kept) > self.max_context:
            kept = kept[1:]
        return kept

    def _length(self, statements: list[str]) -> int:
        """Tokens of a story, or, where spaces belong to words, hardly more."""
        return sum(len(self._ids(f" {statement}" if self.cased else statement)) for statement in statements)

    def _cuts(self, what: str, asked: list[Told]) -> list[str]:
        """How many contexts `max_context` cuts, in words."""
        cut = sum(len(self._kept(one)) < len(one.statements) for one in asked) if self.max_context else 0
        limit = f"to keep to {self.max_context} tokens"
        return [f"the oldest statements of {cut} of {len(asked)} {what} are left out, {limit}"] if cut else []

    def _make_ids(self, text: str) -> list[int]:
        ids = self.encode(text)
        if self.tokenizer.unk_token_id in ids:
            raise GradmemError(f"'{text}' has words that are not in bAbI")
        return ids

    # Files

    def _file(self, task: str, split: Split) -> Path:
        return find_file(Path(str(self.data)), f"{task}_*_{'test' if split == 'test' else 'train'}.txt", task)

    def _read(self, task: str, split: Split) -> list[Told]:
        """Contexts of a split of a task: first contexts of all stories, second ones, and so on."""
        if is_hub(str(self.data)):
            rows = hub_rows(str(self.data), "test" if split == "test" else "train", f"en-{task}")
            source, lines = f"{self.data} {task}", hub_lines(rows)
        else:
            file = self._file(task, split)
            source, lines = str(file), read_lines(file)
        stories = list(read_stories(lines, source, self._ids))
        train = len(stories) - held_out(len(stories), VALID)
        mine = {"train": stories[:train], "valid": stories[train:], "test": stories}[split]
        longest = max(map(len, mine), default=0)
        return [story[turn] for turn in range(longest) for story in mine if turn < len(story)]


def _kinds(of: Mapping[str, tuple[str, ...]], tasks: list[str]) -> Kinds:
    """Kinds of sentences of all these tasks; None where those of one are not known."""
    return None if set(tasks) - set(of) else tuple(dict.fromkeys(kind for name in tasks for kind in of[name]))


def _names(tasks: str | int | list[str | int]) -> list[str]:
    given = tasks.split(",") if isinstance(tasks, str) else tasks if isinstance(tasks, list) else [tasks]
    names = [f"qa{str(name).strip().removeprefix('qa')}" for name in given]
    for name in names:
        if name not in TASKS:
            raise unknown("bAbI task", name, TASKS)
    if not names or len(set(names)) < len(names):
        raise GradmemError(f"`tasks` names each task once, as 'qa1,qa4', not {tasks!r}")
    return names
