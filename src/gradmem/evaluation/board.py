"""The board: what each way of compressing a text keeps of what a language model answers with the whole text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..batch import Tokens
from ..data.paragraphs import Window
from ..device import clock
from ..errors import GradmemError, require, unknown
from ..memory import Memory
from ..methods.base import Method
from ..methods.full_context import FullContext
from ..model import MemoryModel, reading
from ..model.encoding import TextEncoder
from ..prefix import Prefix
from ..progress import Progress, silent
from .board_kept import Done, Kept
from .board_rows import ALONG, FULL, NONE, SWAPPED, TIMED, Key, Outcome, Row, rows_of

SELECT, MATCH, STUDY = CHAIN = ("select", "match", "study")
"""The writers of the method `compact`, in their order; each runs only if it or a later one is asked for."""
COMPACT, LAST = "compact", MATCH
"""The row of what `compact` writes unless it is told otherwise, and its last writer then."""
VECTORS = "vectors"
"""The row of the method `vectors`, whose memories have one size."""
WRITERS = (FULL, NONE, SWAPPED, *CHAIN, COMPACT, VECTORS)


@dataclass(frozen=True)
class Measured:
    """What the board has measured.

    Attributes
    ----------
    rows : list of dict
        One for each writer and budget; see `rows_of`.
    answers : dict
        What was asked and answered, in a form that other programs can ask again. `before` are the token ids before
        every text, `end_ids` those that end an answer, `answer_length` the most tokens of an answer. `texts` has for
        each text its `text`, all token ids `ids` that the model reads for it, and its `questions`: `question`,
        `references`, token ids `query` and `along` (the beginning of the answer with the whole text), and `answers` by
        writer and budget.
    """

    rows: list[Row]
    answers: dict[str, Any]


@dataclass(frozen=True)
class Written:
    """A memory of a text under the names of the writers that leave it.

    Attributes
    ----------
    names : list of str
    budget : float
        As in `Key`.
    method : Method
        The method that reads it.
    memory : Memory
    seconds : float
        Seconds of writing, everything before included.
    """

    names: list[str]
    budget: float
    method: Method
    memory: Memory
    seconds: float


@dataclass(frozen=True)
class Encoded:
    """A text with its questions.

    Attributes
    ----------
    ids : list of int
        Token ids of the text.
    queries : list of list of int
        Token ids of the questions.
    references : list of list of str
        The right answers to each question.
    """

    ids: list[int]
    queries: list[list[int]]
    references: list[list[str]]

    @property
    def digest(self) -> str:
        """A hash of the text and its questions."""
        return hashlib.sha256(json.dumps([self.ids, self.queries, self.references]).encode()).hexdigest()


@dataclass(frozen=True)
class Asked:
    """What the model answers with the whole text.

    Attributes
    ----------
    text : Encoded
    ids : list of list of int
        The first tokens of each answer.
    answers : list of str
    logprobs : Tensor, shape (tokens of all `ids`, vocabulary)
        Log-probabilities at these tokens.
    """

    text: Encoded
    ids: list[list[int]]
    answers: list[str]
    logprobs: Tensor


def measure(
    model: MemoryModel,
    texts: Sequence[Window],
    writers: Sequence[str],
    budgets: Sequence[float],
    about: Row | None = None,
    progress: Progress = silent,
    kept: Path | None = None,
) -> Measured:
    """Write texts with every writer at every budget, and ask all their questions.

    Parameters
    ----------
    model : MemoryModel
        Of the method `full_context`.
    texts : sequence of Window
        At least two: the control `swapped` reads the memory of another text.
    writers : sequence of str
        Names in `WRITERS`; `full`, `none` and `swapped` are always there.
    budgets : sequence of float
        Fractions of the whole cache.
    about : dict, optional
        Further columns of all rows.
    progress : callable
        See `gradmem.progress.Progress`.
    kept : Path, optional
        File that keeps each text's outcomes as soon as they are measured. If it exists, these texts are not measured
        again; they must be the first of `texts`, or begin with them. It is deleted at the end, unless it holds more.

    Raises
    ------
    GradmemError
        If a writer is unknown, a budget is out of range, the model has another method, a text or question is too long
        for it, there are fewer than two texts, or `kept` is of another board.
    KeyboardInterrupt
        After Ctrl-C; it says what is kept.
    """
    if len(texts) < 2:
        raise GradmemError("the board needs at least 2 texts: one of its controls swaps memories between texts")
    board = Board(model, writers, budgets)
    encoded = [board.encode(text) for text in texts]  # all of them first, as one may be too long
    named = {"model": model.fingerprints["checkpoint"], "along": ALONG, "about": about}
    named |= {"writers": sorted(set(writers)), "budgets": board.budgets}
    file = Kept(kept, named, [one.digest for one in encoded])
    board.done += file.texts
    try:
        with torch.no_grad():
            for place, text in enumerate(progress(encoded, title="board", total=len(encoded))):
                if place == len(board.done):
                    board.add(text, encoded[place - 1] if place else None)
                    file.save(board.done)
            board.swap_first(encoded[0], encoded[-1])
    except KeyboardInterrupt as stopped:
        if kept is None or not file.texts:
            raise
        told = f"kept {len(file.texts)} of {len(texts)} texts in {kept}: the same command goes on from there"
        if 2 <= len(file.texts) < len(texts):
            told += f", and with --contexts {len(file.texts)} it ends with these"
        raise KeyboardInterrupt(told) from stopped
    file.remove()
    return Measured(rows_of(board.outcomes, about or {}), {**(about or {}), **board.answers(texts, encoded)})


class Board:
    """Answers from the memories of all writers, collected text by text; see `measure`."""

    def __init__(self, model: MemoryModel, writers: Sequence[str], budgets: Sequence[float]) -> None:
        for writer in writers:
            if writer not in WRITERS:
                raise unknown("writer", writer, WRITERS)
        require("budgets", budgets, bool(budgets), "at least one number")
        for budget in budgets:
            require("a budget", budget, 0 < budget <= 1, "a fraction of the whole cache, above 0 and up to 1")
        if not isinstance(model.method, FullContext):
            raise GradmemError(
                f"the board needs a plain language model or a checkpoint of full_context, and '{model.name}' is none"
            )
        self.model, self.task, self.writers = model, model.task, writers
        self.budgets = sorted(set(budgets), reverse=True)
        self.compact = self._compact() if {*CHAIN, COMPACT} & set(writers) else None
        self.vectors = model.with_method({"name": VECTORS}).method if VECTORS in writers else None
        self.done: list[Done] = []
        """The texts that were measured."""
        self.last: list[Written] = []
        """The memories that the next text's questions are asked for the control `swapped`."""

    def _compact(self) -> Any:
        """Make the method that compresses, on the same weights."""
        last = STUDY if STUDY in self.writers else LAST if {LAST, COMPACT} & set(self.writers) else SELECT
        chain = ",".join(CHAIN[: CHAIN.index(last) + 1])
        return self.model.with_method({"name": COMPACT, "writers": chain}).method

    @property
    def outcomes(self) -> dict[Key, list[Outcome]]:
        """The outcomes of all texts by writer and budget, in the order of the table."""
        keys = sorted(self.done[0].outcomes, key=lambda key: (WRITERS.index(key[0]), -key[1]))
        return {key: [one.outcomes[key] for one in self.done] for key in keys}

    def encode(self, window: Window) -> Encoded:
        """Turn a text and its questions into token ids, and refuse what is too long."""
        text, questions = window
        strictest = self.compact or self.vectors or self.model.method
        encoder = TextEncoder(self.task, strictest, self.model.name)
        queries = [encoder.query_ids(question) for question, _ in questions]
        return Encoded(encoder.context_ids(text), queries, [answers for _, answers in questions])

    def add(self, text: Encoded, before: Encoded | None) -> None:
        """Write one text with every writer and ask all of its questions.

        Parameters
        ----------
        text : Encoded
        before : Encoded, optional
            The text before it, whose memories are written again if they are not there.
        """
        if not self.last:
            self.model.method.write(self._context(text))  # the first pass of a process is slower than the others
        written = list(self._written(text))
        asked = self._ask_full(written[0], text)
        outcomes = dict[Key, Outcome]()
        for one in written:
            outcomes |= dict.fromkeys([(name, one.budget) for name in one.names], self._outcome(one, asked))
        if before is not None:
            outcomes |= self._swapped(asked, before)
        self.done.append(Done(text.digest, asked.ids, asked.answers, outcomes))
        self.last = _furthest(written)

    def swap_first(self, first: Encoded, last: Encoded) -> None:
        """Ask the first text's questions to the memories of the last one."""
        asked = self._ask_full(next(self._controls(first)), first)
        self.done[0].outcomes |= self._swapped(asked, last)

    def answers(self, texts: Sequence[Window], encoded: Sequence[Encoded]) -> dict[str, Any]:
        """What was asked and answered; see `Measured`."""
        outcomes, found = self.outcomes, []
        for place, ((text, questions), tokens, done) in enumerate(zip(texts, encoded, self.done, strict=True)):
            own = {f"{writer} {budget:g}": those[place].answers for (writer, budget), those in outcomes.items()}
            entries = [
                {
                    "question": question,
                    "references": right,
                    "query": query,
                    "along": ids,
                    "answers": dict(zip(own, said, strict=True)),
                }
                for (question, right), query, ids, *said in zip(
                    questions, tokens.queries, done.ids, *own.values(), strict=True
                )
            ]
            found.append({"text": text, "ids": [*self.task.before_context, *tokens.ids], "questions": entries})
        task = self.task
        about = {"before": task.before_context, "end_ids": task.end_ids, "answer_length": task.answer_length}
        return {**about, "texts": found}

    def _context(self, text: Encoded) -> Tokens:
        return Tokens.from_lists([text.ids], self.task.pad_id).to(self.model.device)

    def _written(self, text: Encoded) -> Iterator[Written]:
        """What the controls and all writers leave of a text."""
        yield from self._controls(text)
        yield from self._compacted(text.ids)
        if self.vectors is not None:
            started = clock()
            memory = self.vectors.write(self._context(text)).memory
            yield Written([VECTORS], float(self.vectors.n_mem), self.vectors, memory, clock() - started)

    def _controls(self, text: Encoded) -> Iterator[Written]:
        """The whole cache, and the memory of a text that was not read."""
        method, context, started = self.model.method, self._context(text), clock()
        full = method.write(context).memory
        yield Written([FULL], 1.0, method, full, clock() - started)
        yield Written([NONE], 0.0, method, next(iter(method.trajectory(context, 0))).memory, 0.0)

    def _compacted(self, ids: list[int]) -> Iterator[Written]:
        """What each writer leaves at each budget."""
        if self.compact is None:
            return
        started = clock()
        text = self.compact.read_text(ids)
        read = clock() - started
        for budget in self.budgets:
            seconds, started = read, clock()
            for name, memory in self.compact.compacted(text, budget):
                seconds += clock() - started
                names = [name, COMPACT] if name == LAST else [name]
                if chosen := [one for one in names if one in self.writers]:
                    yield Written(chosen, budget, self.compact, memory, seconds)
                started = clock()

    def _ask_full(self, full: Written, text: Encoded) -> Asked:
        prefix, rows = full.method.prefix(full.memory), [0] * len(text.queries)
        generated = reading.generate(full.method, self.task, prefix, rows, text.queries, {})
        ids = [self._up_to_end(one)[:ALONG] for one in generated]
        logprobs = self._logprobs(full.method, prefix, text.queries, ids)
        return Asked(text, ids, [self.task.decode(one) for one in generated], logprobs)

    def _outcome(self, written: Written, asked: Asked) -> Outcome:
        method, queries = written.method, asked.text.queries
        prefix = method.prefix(written.memory)
        generated = reading.generate(method, self.task, prefix, [0] * len(queries), queries, {})
        wanted, found = asked.logprobs, self._logprobs(method, prefix, queries, asked.ids)
        seconds = None
        if len(self.done) < TIMED:
            started = clock()
            fixed = {"min_new_tokens": ALONG, "max_new_tokens": ALONG}
            reading.generate(method, self.task, prefix, [0], queries[:1], fixed)
            seconds = clock() - started
        return Outcome.of(
            [self.task.decode(one) for one in generated],
            asked.text.references,
            asked.answers,
            kl=float((wanted.exp() * (wanted - found)).sum(-1).mean()),
            agreement=float((wanted.argmax(-1) == found.argmax(-1)).double().mean()),
            bytes=written.memory.nbytes,
            write_seconds=written.seconds,
            query_seconds=seconds,
        )

    def _logprobs(self, method: Method, prefix: Prefix, queries: list[list[int]], answers: list[list[int]]) -> Tensor:
        """Log-probabilities at all tokens of given answers."""
        rows = prefix.select(torch.zeros(len(queries), dtype=torch.long, device=method.device))
        return torch.cat([logprobs for logprobs, _ in reading.read_answers(method, rows, queries, answers)])

    def _swapped(self, asked: Asked, other: Encoded) -> dict[Key, Outcome]:
        """Ask the questions of a text to the last memories, which are of another one."""
        if not self.last:  # a stopped run goes on
            self.last = _furthest(list(self._written(other)))
        return {(SWAPPED, written.budget): self._outcome(written, asked) for written in self.last}

    def _up_to_end(self, ids: list[int]) -> list[int]:
        """Generated tokens up to the first that ends the answer."""
        last = next((at for at, one in enumerate(ids) if one in self.task.end_ids), len(ids))
        return ids[: last + 1]


def _furthest(written: Sequence[Written]) -> list[Written]:
    """The memory of the furthest writer at each budget; without writers, the whole cache."""
    return list({one.budget: one for one in written if one.names[0] not in (FULL, NONE)}.values()) or [*written[:1]]
