"""Study: a few small gradient steps through the model, on answers to questions about the text.

Training a memory on the text itself teaches it to recite. What it should learn is how the model with the whole text
answers, so the loss is the KL divergence to that model along its own answers.
"""

from __future__ import annotations

import random
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..backbone import Backbone
from ..batch import Tokens
from ..generation import generate
from ..ops.dtypes import wide
from ..prefix import Prefix
from ..tasks.base import Task
from .entries import Entries
from .fidelity import divergence, fidelity
from .match import sizes_of
from .questions import ASK, LONGEST
from .text import Asked, Text, continuations, encoded, greedy_answers

QUESTIONS = 4
"""Questions of a step."""
SAMPLES = 6
"""Questions that the model asks itself in each style."""
HELD_OUT = 4
"""One in so many questions is not studied and decides which step's memory is kept."""


@dataclass(frozen=True)
class Pace:
    """How far to descend.

    Attributes
    ----------
    steps : int
    rate : float
        Rate of Adam relative to the size of what moves. It falls to zero in the second half of the steps.
    every : int
        Steps between two checks by questions that are not studied.
    """

    steps: int
    rate: float
    every: int


PACE = Pace(steps=16, rate=0.005, every=4)
"""Of keys and values, relative to those of their head."""


def study(
    entries: Entries, text: Text, backbone: Backbone, task: Task, prefix_of: Callable[[Entries], Prefix]
) -> Entries:
    """Take gradient steps on keys and values, and keep the best state; the start, if nothing gets better.

    Parameters
    ----------
    entries : Entries
        The start.
    text : Text
    backbone : Backbone
    task : Task
    prefix_of : callable
        Puts entries into the cache of the model, differentiably.
    """
    start = [entries.keys, entries.values]

    def moved(tensors: list[Tensor]) -> Entries:
        keys, values = tensors
        return replace(entries, keys=keys, values=values, places=None)

    asked = Asked.join([text.study, questions_about(text.ids, backbone, task, prefix_of(text.whole))])
    sizes = [sizes_of(wide(tensor), entries.used) for tensor in start]
    states = descend(start, sizes, lambda tensors: prefix_of(moved(tensors)), asked, backbone, PACE)
    best = deque(states, maxlen=1).pop()
    return entries if best is start else moved(best)


def descend(
    start: list[Tensor],
    sizes: list[Tensor],
    prefix_of: Callable[[list[Tensor]], Prefix],
    asked: Asked,
    backbone: Backbone,
    pace: Pace,
) -> Iterator[list[Tensor]]:
    """Take gradient steps on tensors, and yield the best state so far after each.

    Parameters
    ----------
    start : list of Tensor
    sizes : list of Tensor
        The length of a move for which the rate counts as it is.
    prefix_of : callable
        Puts the tensors before a question, differentiably.
    asked : Asked
        Questions. One in `HELD_OUT` is not studied and decides which state is the best. If there are fewer, the start
        is.
    backbone : Backbone
    pace : Pace
    """
    if len(asked.queries) < HELD_OUT:
        yield from [start] * pace.steps
        return
    known, studied = asked.split(HELD_OUT)
    batches = _batches([*studied.each()])
    moves = [torch.zeros_like(tensor, dtype=torch.float, requires_grad=True) for tensor in start]
    optimizer = torch.optim.Adam(moves, lr=pace.rate, betas=(0.9, 0.95))

    def moved() -> list[Tensor]:
        pairs = zip(start, moves, sizes, strict=True)
        return [tensor + (move * size).to(tensor.dtype) for tensor, move, size in pairs]

    best, least = start, fidelity(backbone, prefix_of(start), known)[0]
    for step in range(1, pace.steps + 1):
        optimizer.param_groups[0]["lr"] = pace.rate * min(1, 2 * (1 - (step - 1) / pace.steps))
        with torch.enable_grad():
            loss = answer_loss(backbone, prefix_of(moved()), next(batches))
            gradients = torch.autograd.grad(loss, moves)
        for move, gradient in zip(moves, gradients, strict=True):
            move.grad = gradient
        optimizer.step()
        if step % pace.every == 0:
            with torch.no_grad():
                state = moved()
            if (found := fidelity(backbone, prefix_of(state), known)[0]) < least:
                best, least = state, found
        yield best


@torch.no_grad()
def questions_about(ids: list[int], backbone: Backbone, task: Task, prefix: Prefix) -> Asked:
    """Questions that the model asks itself and questions cut from sentences, with its answers after the whole text.

    There are none if the task takes none in plain words.
    """
    own = [query for query in encoded(task, ASK) for _ in range(SAMPLES)]
    if not own:
        return Asked.read(backbone, prefix, [], [])
    options: dict[str, Any] = task.greedy_options() | {"max_new_tokens": LONGEST, "do_sample": True, "temperature": 0.8}
    rows = torch.zeros(len(own), dtype=torch.long, device=prefix.last.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        said = [task.decode(ids) for ids in generate(backbone, prefix.select(rows), own, task.pad_id, **options)]
    queries = encoded(task, list(dict.fromkeys(filter(None, map(_question, said)))))
    queries += [query for query, _ in continuations(task, ids)]
    random.Random(0).shuffle(queries)
    return Asked.read(backbone, prefix, queries, greedy_answers(backbone, task, prefix, queries))


def _question(said: str) -> str | None:
    """The question in what the model said; None if there is none."""
    found = re.search(r"[A-Z][^?\n]{8,}\?", said)
    return found[0] if found else None


def _batches(pool: list[Asked]) -> Iterator[list[Asked]]:
    """Questions without end, from at least one: fresh ones at every step, until all were used."""
    order = random.Random(0)
    while True:
        order.shuffle(pool)
        yield from (pool[i : i + QUESTIONS] for i in range(0, len(pool), QUESTIONS))


def answer_loss(backbone: Backbone, prefix: Prefix, asked: list[Asked]) -> Tensor:
    """Mean KL divergence along the answers after a prefix of one row, all questions read in one batch."""
    pairs = [(one.queries[0], one.answers[0]) for one in asked]
    tokens = Tokens.from_lists([query + answer for query, answer in pairs]).to(prefix.last.device)
    own = prefix.select(torch.zeros(len(pairs), dtype=torch.long, device=prefix.last.device))
    with own.active():
        embeds = backbone.embed(tokens.ids)
        hidden = backbone.hidden(embeds, own.cache, **own.continued(embeds.shape[1]))
    found = [hidden[row, len(query) - 1 : len(query) + len(answer) - 1] for row, (query, answer) in enumerate(pairs)]
    parts = divergence(backbone, torch.cat([one.hidden for one in asked]), torch.cat(found))
    return torch.cat([divergences for divergences, _ in parts]).mean()
