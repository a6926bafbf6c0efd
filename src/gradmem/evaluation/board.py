"""The board: what each way of compressing a text keeps of what a language model answers with the whole text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
from .board_rows import ALONG, FULL, NONE, SWAPPED, TIMED, Key, Outcome, Row, rows_of

SELECT, MATCH, STUDY = CHAIN = ("select", "match", "study")
"""The writers of the method `compact`, in their order; each runs only if it or a later one is asked for."""
COMPACT, LAST = "compact", MATCH
"""The row of what `compact` writes unless it is told otherwise, and its last writer then."""
WRITERS = (FULL, NONE, SWAPPED, *CHAIN, COMPACT)


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
        Fraction of the whole cache.
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

    Raises
    ------
    GradmemError
        If a writer is unknown, a budget is out of range, the model has another method, a text or question is too long
        for it, or there are fewer than two texts.
    """
    if len(texts) < 2:
        raise GradmemError("the board needs at least 2 texts: one of its controls swaps memories between texts")
    board = Board(model, writers, budgets)
    encoded = [board.encode(text) for text in texts]  # all of them first, as one may be too long
    with torch.no_grad():
        for text in progress(encoded, title="board", total=len(encoded)):
            board.add(text)
        board.swap_first()
    return Measured(rows_of(board.outcomes, about or {}), {**(about or {}), **board.answers(texts)})


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
        self.compact = self._compact() if set(writers) - {FULL, NONE, SWAPPED} else None
        self.asked: list[Asked] = []
        self.last: list[Written] = []
        """The memories that the next text's questions are asked for the control `swapped`."""
        self._outcomes: dict[Key, list[Outcome]] = {}

    def _compact(self) -> Any:
        """Make the method that compresses, on the same weights."""
        last = STUDY if STUDY in self.writers else LAST if {LAST, COMPACT} & set(self.writers) else SELECT
        chain = ",".join(CHAIN[: CHAIN.index(last) + 1])
        return self.model.with_method({"name": COMPACT, "writers": chain}).method

    @property
    def outcomes(self) -> dict[Key, list[Outcome]]:
        """The outcomes of all texts by writer and budget, in the order of the table."""
        return dict(sorted(self._outcomes.items(), key=lambda item: (WRITERS.index(item[0][0]), -item[0][1])))

    def encode(self, window: Window) -> Encoded:
        """Turn a text and its questions into token ids, and refuse what is too long."""
        text, questions = window
        encoder = TextEncoder(self.task, self.compact or self.model.method, self.model.name)  # the stricter one
        queries = [encoder.query_ids(question) for question, _ in questions]
        return Encoded(encoder.context_ids(text), queries, [answers for _, answers in questions])

    def add(self, text: Encoded) -> None:
        """Write one text with every writer and ask all of its questions."""
        context = Tokens.from_lists([text.ids], self.task.pad_id).to(self.model.device)
        if not self.asked:
            self.model.method.write(context)  # the first pass of a process is slower than the others
        controls = list(self._controls(context))
        asked = self._ask_full(controls[0], text)
        compact = list(self._compacted(text.ids))
        for written in controls + compact:
            outcome = self._outcome(written, asked)
            for name in written.names:
                self._outcomes.setdefault((name, written.budget), []).append(outcome)
        self._swap(asked, len(self.asked))
        # Log-probabilities take much memory: only those of the first text are needed again.
        self.asked.append(asked if not self.asked else replace(asked, logprobs=asked.logprobs.new_zeros(0)))
        # The furthest writer of each budget, or the whole cache if there are no writers.
        self.last = list({one.budget: one for one in compact or controls[:1]}.values())

    def swap_first(self) -> None:
        """Ask the first text's questions to the memories of the last one."""
        self._swap(self.asked[0], 0)

    def answers(self, texts: Sequence[Window]) -> dict[str, Any]:
        """What was asked and answered; see `Measured`."""
        outcomes, found = self.outcomes, []
        for place, ((text, questions), asked) in enumerate(zip(texts, self.asked, strict=True)):
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
                    questions, asked.text.queries, asked.ids, *own.values(), strict=True
                )
            ]
            found.append({"text": text, "ids": [*self.task.before_context, *asked.text.ids], "questions": entries})
        task = self.task
        about = {"before": task.before_context, "end_ids": task.end_ids, "answer_length": task.answer_length}
        return {**about, "texts": found}

    def _controls(self, context: Tokens) -> Iterator[Written]:
        """The whole cache, and the memory of a text that was not read."""
        method, started = self.model.method, clock()
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
        if len(self.asked) < TIMED:
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

    def _swap(self, asked: Asked, place: int) -> None:
        """Ask the questions of a text to the last memories, which are of another one."""
        for written in self.last:
            own = self._outcomes.setdefault((SWAPPED, written.budget), [])
            own.insert(place and len(own), self._outcome(written, asked))

    def _up_to_end(self, ids: list[int]) -> list[int]:
        """Generated tokens up to the first that ends the answer."""
        last = next((at for at, one in enumerate(ids) if one in self.task.end_ids), len(ids))
        return ids[: last + 1]
