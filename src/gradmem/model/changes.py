"""Measure what joining memories, and replacing or forgetting a chunk, changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..batch import Tokens
from ..compaction.questions import STOCK
from ..memory import Memory, digest
from .model import BoundMemory
from .reading import read_answers

ANSWER = 24
"""Most tokens of an answer by which a change is measured."""


@dataclass(frozen=True)
class Moved:
    """How likely an answer is, before and after a change: the geometric mean of the probabilities of its tokens.

    Attributes
    ----------
    of : str
        Whose answer it is.
    question, answer : str
    before, after : float
        With the memory before and after the change.
    unwritten : float
        Without any text.
    """

    of: str
    question: str
    answer: str
    before: float
    after: float
    unwritten: float


def row_digests(memory: Memory) -> list[str]:
    """SHA-256 of the tensors of each row: the same where no byte of a chunk has changed."""
    return [digest(memory[row].tensors) for row in range(len(memory))]


def compared(
    of: str, teller: BoundMemory, before: BoundMemory, after: BoundMemory, questions: Sequence[str] = ()
) -> list[Moved]:
    """Measure how a change moves the answers that one memory gives.

    Parameters
    ----------
    of : str
        Whose answers they are.
    teller : BoundMemory
        It gives the answers.
    before, after : BoundMemory
        The memories before and after the change.
    questions : sequence of str
        By default those that fit any text.
    """
    asked = list(questions or STOCK)
    answers: list[str] = teller.ask(asked, max_new_tokens=ANSWER)
    unwritten = _unwritten(after)
    measured = [probabilities(memory, asked, answers) for memory in (before, after, unwritten)]
    return [Moved(of, *row) for row in zip(asked, answers, *measured, strict=True)]


def probabilities(memory: BoundMemory, questions: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Geometric mean of the probabilities of each answer's tokens, after its question and the chunks that this reads.

    Parameters
    ----------
    memory : BoundMemory
    questions, answers : sequence of str
    """
    model, found = memory.model, []
    for question, answer in zip(questions, answers, strict=True):
        query, target = model.task.target(question, answer)
        prefix = memory.together(memory.chosen(query)).prefix
        with torch.no_grad():
            row = prefix.select(torch.zeros(1, dtype=torch.long, device=prefix.last.device))
            ((logprobs, _),) = read_answers(model.method, row, [query], [target])
        taken = logprobs.gather(1, torch.tensor(target, device=logprobs.device)[:, None])
        found.append(round(float(taken.mean().exp()), 4))
    return found


def _unwritten(memory: BoundMemory) -> BoundMemory:
    """The memory of no text, of the same model: that before the first write step."""
    model = memory.model
    context = Tokens.from_lists([model.task.encode("a")]).to(model.device)
    with torch.no_grad():
        nothing: Memory = model.method.write(context, 0).memory
    return BoundMemory(nothing.tensors, model=model)
