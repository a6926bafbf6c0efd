"""bAbI question answering (Weston et al., arXiv 1502.05698): qa1 to qa20 from files, qa1 to qa5 generated too."""

from __future__ import annotations

import math
import re
from functools import lru_cache
from itertools import takewhile
from operator import itemgetter
from random import Random
from typing import Any

from torch import Tensor

from ..batch import Batch
from ..data import Query, Sample, Samples, babi_stories, cached, collate, digest_files, split_indices
from ..data.babi_facts import (
    EXAMPLE_QUESTIONS,
    EXAMPLE_STATEMENTS,
    QUESTION_KINDS,
    QUESTIONS,
    STATEMENT_KINDS,
    STATEMENTS,
    Facts,
    kinds_of,
    match,
)
from ..data.babi_files import (
    HELD_OUT,
    NUMBER,
    QUESTION,
    WORDS,
    describe_overlap,
    find_stories,
    read_excerpts,
    task_names,
    word_tokenizer,
)
from ..data.babi_questions import draw_questions
from ..data.babi_stories import Excerpt, draw_excerpts
from ..data.sources import is_hub
from ..errors import GradmemError
from ..pretrained import digest_tokenizer, pretrained_tokenizer
from .base import WRITTEN, FileTask, Split

NAMES = [name.lower() for name in babi_stories.EVERYBODY]
"""All people of the stories, in small letters."""
LONGEST_ANSWER = "football,apple,milk"
"""The answer with most tokens."""
BLOCK = 1024
"""Samples of a task generated at once."""


class Babi(FileTask):
    """Stories in sentences; questions about the story so far, answered with a word or a short list.

    A context is all statements before a question. Questions at the same point share a context.

    Parameters
    ----------
    tasks : str, int, or list of these
        Which of qa1 to qa20, as "qa1,qa4" or [1, 4].
    data : str, optional
        Directory with the official files, or a data set of the hub in the form of facebook/babi_qa. The train files are
        for training and validation (one in ten stories), the test files for the test split. By default stories are
        generated, which is possible for qa1 to qa5.
    generated : float
        With `data`: the share of training samples that are generated, 0 to 1.
    max_context : int, optional
        Most tokens of a context. Longer stories lose their oldest statements; a note says how many do.
    tokenizer : str, optional
        Hub name, directory or GGUF file of a pretrained tokenizer, for a pretrained backbone. Stories, questions and
        answers are then spelled as in the files, names always with capitals. By default every word is a token, in small
        letters.
    ask_all : bool
        Whether generated training stories ask every question that has an answer at this point, instead of the one that
        the official files ask. Each memory then trains several times as many answers.
    max_statements : int, optional
        Most statements of a generated context, at least 2: for curricula that begin with short stories.
    crowded : bool
        Whether generated training stories have 21 people and nine rooms instead of four and six. Answers are then
        harder to guess, so a model learns sooner to remember them.
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
        self.tasks, self.data = task_names(tasks), data
        if not 0 <= generated <= 1:
            raise GradmemError(f"generated must be from 0 to 1, not {generated}")
        if max_context is not None and max_context < 16:
            raise GradmemError(f"max_context must be at least 16, not {max_context}")
        if max_statements is not None and max_statements < 2:
            raise GradmemError(f"max_statements must be at least 2, not {max_statements}")
        self.generated = generated if data else 1.0
        self.ask_all, self.max_statements, self.crowded = ask_all, max_statements, crowded
        self.max_context = max_context
        self._statement_kinds = kinds_of(self.tasks, STATEMENT_KINDS)
        self._question_kinds = kinds_of(self.tasks, QUESTION_KINDS)
        self.cased = tokenizer is not None
        self.tokenizer = pretrained_tokenizer(tokenizer) if tokenizer else word_tokenizer()
        self._ids = lru_cache(maxsize=65536)(self._make_ids)
        self.answer_length = max(len(self.encode(f" {answer}")) for answer in (*WORDS, *NAMES, LONGEST_ANSWER)) + 1
        self._block = lru_cache(maxsize=8)(self._make_block)

    @property
    def label(self) -> str:
        """The names of the tasks."""
        return ",".join(self.tasks)

    def variants(self) -> list[dict[str, Any]]:
        """Evaluate each task separately."""
        return [{"tasks": name} for name in self.tasks]

    def source(self, split: Split) -> str:
        """Return "generated", or the name of the data."""
        share = self._share(split)
        return "generated" if share == 1 else f"{self.data}, {share:.0%} generated" if share else str(self.data)

    def size(self, split: Split) -> int | None:
        """Number of contexts in a split; None if some are generated."""
        return None if self._share(split) else super().size(split)

    def notes(self, split: Split) -> list[str]:
        """How many contexts are cut, and how many test contexts the training files have too."""
        share, notes = self._share(split), []
        if share and self.max_context:
            for name in self.tasks:
                notes += self._cut_notes(f"generated contexts of {name}", self._generate(name, split, 0, 0))
        if share < 1:
            notes += super().notes(split)
        if split == "test" and not share:
            try:
                notes += self.overlap_notes()
            except GradmemError as error:
                notes.append(f"test contexts are not compared with training contexts: {error}")
        return notes

    def batch(self, split: Split, start: int, size: int, seed: int = 0) -> Batch:
        """Samples of a split; see `Task.batch`. Generated samples are spread evenly among those from files."""
        share, chosen = self._share(split), []
        for number in range(start, start + size):
            before = int(number * share)
            if int((number + 1) * share) > before:
                chosen.append(self._generated_sample(split, before, seed))
            else:
                samples = self.samples(split)
                chosen.append(samples[int(split_indices(split, number - before, 1, len(samples), seed)[0])])
        return collate(chosen, self.pad_id)

    def load(self, split: Split) -> Samples:
        """Read the files of the tasks, one task after the other.

        Within a task each story gives a context in turn: evaluation swaps the memories of neighbours, which must be of
        different stories, and a few contexts must stand for all.
        """
        data = str(self.data)
        about: dict[str, Any] = {"task": "babi", "split": split, "max_context": self.max_context, "held_out": HELD_OUT}
        about |= {"order": "each story in turn", "tokenizer": digest_tokenizer(self.tokenizer)}
        if is_hub(data):
            about |= {"hub": data, "tasks": self.tasks}
        else:
            about |= {"files": digest_files(find_stories(data, name, split) for name in self.tasks)}

        def make() -> Samples:
            excerpts = [one for name in self.tasks for one in self._read(name, split)]
            return Samples.build(map(self._sample, excerpts), self._cut_notes(f"{split} contexts", excerpts))

        return cached(about, make)

    def overlap_notes(self) -> list[str]:
        """Say for each task how many test contexts, alone and with their questions, the training files have too."""
        notes = []
        for name in self.tasks:
            known = [one for split in ("train", "valid") for one in self._read(name, split)]
            notes.append(f"{name}: {describe_overlap(known, self._read(name, 'test'))}")
        return notes

    # Text

    def may_end(self, ids: Tensor) -> Tensor:
        """A chunk may end after a statement."""
        return ids == self._ids("mary.")[-1]

    def context_text(self, text: str) -> str:
        """Accept sentences in any case and punctuation, or lines of the official format, whose questions are ignored.

        Raises
        ------
        GradmemError
            If there is a question among the statements, or a sentence of a form that the tasks do not have. The message
            names the line.
        """
        told: list[str] = []
        for number, line in enumerate(text.splitlines(), 1):
            if not QUESTION.fullmatch(line):
                told += self._statements(line, f"line {number}")
        lines = [match(one, STATEMENTS, ["line"]) is not None for one in told]
        if self._statement_kinds is not None and any(lines) and not all(lines):
            raise GradmemError(
                "statements about rooms ('The office is north of the kitchen') and statements about people belong in "
                "different memories: write two"
            )
        return " ".join(f"{self._spelled(words)}." for words in told)

    def _statements(self, line: str, where: str) -> list[str]:
        """Statements of a line, in small letters and without punctuation."""
        found = []
        for sentence in re.findall(r"[^.!?]*[.!?]+|[^.!?]+$", line):
            words = " ".join(self._words(re.sub(f"^{NUMBER}", "", sentence)))
            if "?" in sentence:
                raise GradmemError(
                    f"{where}: '{sentence.strip()}' is no statement: leave it out here, and ask it of the memory"
                )
            if not words and not sentence.strip():
                continue
            if not words or not self._knows(words, STATEMENTS, self._statement_kinds):
                raise GradmemError(
                    f"{where}: '{sentence.strip()}' is no sentence that it was trained on; write sentences like "
                    + self._like(EXAMPLE_STATEMENTS, self._statement_kinds)
                )
            found.append(words)
        return found

    def query_text(self, text: str) -> str:
        """Accept a question in any case, with or without its question mark, or a line of the official format.

        Raises
        ------
        GradmemError
            If the tasks do not ask questions of this form.
        """
        official = QUESTION.fullmatch(text)
        question = official[1] if official else text
        words = " ".join(self._words(re.sub(f"^{NUMBER}", "", question)))
        if words and not self._knows(words, QUESTIONS, self._question_kinds):
            raise GradmemError(
                f"'{text.strip()}' is no question that it was trained on; ask questions like "
                + self._like(EXAMPLE_QUESTIONS, self._question_kinds)
            )
        return f"{self._spelled(words)}?" if words else ""

    def _knows(self, words: str, patterns: dict[str, list[str]], kinds: tuple[str, ...] | None) -> bool:
        """Whether a sentence is of one of these kinds. One with unknown words counts: encoding will name the words."""
        unknown = self.tokenizer.unk_token_id is not None and self.tokenizer.unk_token_id in self.encode(words)
        return kinds is None or unknown or match(words, patterns, kinds) is not None

    def _like(self, examples: dict[str, str], kinds: tuple[str, ...] | None) -> str:
        return ", ".join(f"'{examples[kind]}'" for kind in kinds or ()) or "those of its tasks"

    def answer_text(self, text: str) -> str:
        """Write names with a capital letter, and lists as "apple,milk"."""
        words = [word.capitalize() if word in NAMES else word for word in text.split()]
        return " ".join(words).replace(" , ", ",")

    def examples(self, text: str) -> list[tuple[str, str]]:
        """All questions that the story answers; for qa6 to qa20 the questions of the official format at its end."""
        if self._statement_kinds is None or self._question_kinds is None:
            asked = [(QUESTION.fullmatch(line), line) for line in text.splitlines() if line.strip()]
            last = list(takewhile(itemgetter(0), reversed(asked)))
            return [(found[1].strip(), found[2].strip()) for found, _ in reversed(last) if found]
        told = [sentence.strip().lower() for sentence in self.context_text(text).split(".") if sentence]
        if not all(match(one, STATEMENTS, self._statement_kinds) for one in told):
            return []  # a sentence with unknown words
        return [
            (self._as_asked(question), self.answer_text(answer))
            for question, answer in Facts.of(told).answers().items()
            if match(question, QUESTIONS, self._question_kinds)
        ]

    def _as_asked(self, question: str) -> str:
        """Write a question with its capitals and its question mark."""
        words = self.answer_text(question)
        return f"{words[0].upper()}{words[1:]}?"

    def example(self, seed: int = 0) -> tuple[str, list[tuple[str, str]]] | None:
        """A generated story and all questions that it answers; None if none of the tasks can be generated."""
        if not (tasks := [name for name in self.tasks if name in babi_stories.TASKS]):
            return None
        random = Random(f"example {seed}")
        last = babi_stories.TASKS[random.choice(tasks)](random, True, False, math.inf)[-1]
        return " ".join(last.statements), last.questions

    def unanswerable(self, batch: Batch) -> dict[str, Batch]:
        """The questions of the batch, changed to be about a person or a thing that the story does not mention.

        Questions that cannot be changed so are left out: nobody is missing from a story that names all people.
        """
        contexts = [ids[mask].tolist() for ids, mask in zip(batch.context.ids, batch.context.mask, strict=True)]
        stories = [set(self._words(self.text(ids))) for ids in contexts]
        samples = [Sample(ids, []) for ids in contexts]
        for number, (prompt, labels, row) in enumerate(zip(batch.prompts(), batch.labels, batch.rows, strict=True)):
            question = self._about_another(self.text(prompt), stories[int(row)], number)
            if question is not None:
                ids = self.encode(f"{self._spelled(question)}?")
                samples[int(row)].queries.append(Query([*ids, *labels[labels >= 0].tolist()], len(ids)))
        return {"of what is not mentioned": collate(samples, self.pad_id).to(batch.rows.device)}

    def calibration(self, split: Split, start: int, size: int, seed: int = 0) -> dict[str, Batch]:
        """Generated stories of every length, crowded or not, with questions that they answer and that they do not.

        The latter are about people and things that the story does not name, or does not say this of.
        """
        if self._statement_kinds is None or self._question_kinds is None:
            return super().calibration(split, start, size, seed)
        kinds: dict[str, list[Sample]] = {WRITTEN: [], "of what is not named": [], "of what is not told": []}
        for number in range(start, start + size):
            random = Random(f"calibration {split} {seed} {number}")
            drawn = draw_questions(random, self.tasks, self._question_kinds, self.max_statements)
            context = self.encode(" ".join(self._cut(drawn.statements)))
            for kind, questions in zip(kinds, (drawn.answered, drawn.unnamed, drawn.untold), strict=True):
                kinds[kind].append(Sample(context, [self._query(*one) for one in questions]))
        return {kind: collate(samples, self.pad_id) for kind, samples in kinds.items()}

    def _about_another(self, question: str, story: set[str], number: int) -> str | None:
        """The question with one name replaced by another of the same kind that is not in the story; None if none is."""
        for word in self._words(question):
            kinds = [kind for kind in babi_stories.KINDS if word in kind]
            kind = max(kinds, key=lambda kind: len(story & set(kind)), default=[])
            if absent := [name for name in kind if name not in story]:
                return re.sub(rf"\b{word}\b", absent[number % len(absent)], question, flags=re.IGNORECASE)
        return None

    def _words(self, text: str) -> list[str]:
        """Words without punctuation, in small letters. Other symbols stay, so that they are refused as unknown."""
        return re.findall(r"[\w']+|[^\w\s.,;:!?\"()-]+", text.lower())

    def _spelled(self, sentence: str) -> str:
        """Words in small letters without punctuation; for pretrained tokenizers names and the first have capitals."""
        words = self._words(sentence)
        if self.cased:
            words = [word.capitalize() if not i or word in NAMES else word for i, word in enumerate(words)]
        return " ".join(words)

    # Samples

    def _share(self, split: Split) -> float:
        """The share of a split that is generated."""
        return self.generated if split == "train" or self.data is None else 0.0

    def _read(self, task: str, split: Split) -> list[Excerpt]:
        return read_excerpts(str(self.data), task, split, self._ids)

    def _generated_sample(self, split: Split, number: int, seed: int) -> Sample:
        """Generated sample `number`; tasks take turns."""
        turn, task = divmod(number, len(self.tasks))
        return self._block(self.tasks[task], split, seed, turn // BLOCK)[turn % BLOCK]

    def _make_block(self, task: str, split: Split, seed: int, block: int) -> list[Sample]:
        return [self._sample(one) for one in self._generate(task, split, seed, block)]

    def _generate(self, task: str, split: Split, seed: int, block: int) -> list[Excerpt]:
        random, train = Random(f"{task} {split} {seed} {block}"), split == "train"
        options = {"ask_all": train and self.ask_all, "crowded": train and self.crowded}
        return draw_excerpts(task, random, BLOCK, **options, max_statements=self.max_statements)

    def _sample(self, excerpt: Excerpt) -> Sample:
        context = self.encode(" ".join(self._cut(excerpt.statements)))
        return Sample(context, [self._query(question, answer) for question, answer in excerpt.questions])

    def _query(self, question: str, answer: str) -> Query:
        prompt, target = self.target(question, answer)
        return Query([*prompt, *target], len(prompt))

    def target(self, query: str, answer: str) -> tuple[list[int], list[int]]:
        """Tokens of a question, which may be of any form, and of its answer."""
        return self.encode_pair(f"{self._spelled(query)}?", f" {answer}")

    def _cut(self, statements: list[str]) -> list[str]:
        """The last statements of a story that have at most `max_context` tokens."""
        while self.max_context is not None and len(statements) > 1 and self._length(statements) > self.max_context:
            statements = statements[1:]
        return statements

    def _length(self, statements: list[str]) -> int:
        """Tokens of a story; where spaces belong to words, a few more."""
        return sum(len(self._ids(f" {statement}" if self.cased else statement)) for statement in statements)

    def _cut_notes(self, what: str, excerpts: list[Excerpt]) -> list[str]:
        """Say how many contexts `max_context` cuts."""
        if not self.max_context:
            return []
        count = sum(len(self._cut(one.statements)) < len(one.statements) for one in excerpts)
        limit = f"to keep to {self.max_context} tokens"
        return [f"the oldest statements of {count} of {len(excerpts)} {what} are left out, {limit}"] if count else []

    def _make_ids(self, text: str) -> list[int]:
        ids = self.encode(text)
        if self.tokenizer.unk_token_id in ids:
            raise GradmemError(f"'{text}' has words that are not in bAbI")
        return ids
