"""What compaction knows of a text: its whole key-value cache, and what questions look for in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone import Backbone
from ..errors import GradmemError
from ..generation import generate
from ..ops.dtypes import wide
from ..ops.head_attention import head_attention
from ..prefix import Prefix
from ..tasks.base import Task
from .entries import Entries
from .questions import ANSWER, CLOZE, HELD_OUT, REPEAT, SHORTEST, STOCK

MOST_QUERIES = 1536
"""Most reference queries of a head. More take longer and say little that is new."""


Pairs = tuple[list[list[int]], list[list[int]]]
"""Token ids of questions, and of their answers."""


@dataclass(frozen=True)
class References:
    """Queries of the model with the whole text, and what they find.

    Attributes
    ----------
    queries : Tensor, shape (layers, key-value heads, query heads each, queries, width)
        Already scaled.
    mass : Tensor, shape (layers, key-value heads, query heads each, queries)
        Log of the attention mass outside of the text: the sum of exponentials of scores.
    output : Tensor, shape (layers, key-value heads, query heads each, queries, value width)
        Attention output of what is outside of the text alone.
    wanted : Tensor, as `output`
        Attention output of everything.
    seen : Tensor, shape (layers, key-value heads, query heads each, entries)
        Mean square of the attention to each entry of the text.
    cap : float or None
        Cap of attention scores, for models that have one.
    """

    queries: Tensor
    mass: Tensor
    output: Tensor
    wanted: Tensor
    seen: Tensor
    cap: float | None

    def of(self, heads: Tensor) -> References:
        """Those of some key-value heads, numbered over all layers; layers and heads are then one dimension."""
        flat = self.flat()
        return flat._map(lambda tensor: tensor[heads])

    def flat(self) -> References:
        """The same, with layers and key-value heads as one dimension."""
        return self._map(lambda tensor: tensor.flatten(0, 1))

    def some(self, numbers: Tensor) -> References:
        """Some queries of references without layers, numbered."""
        own = numbers.to(self.queries.device)
        return self._map(lambda tensor: tensor[:, :, own])

    def _map(self, change: Callable[[Tensor], Tensor]) -> References:
        queries, mass, output, wanted = map(change, (self.queries, self.mass, self.output, self.wanted))
        return References(queries, mass, output, wanted, self.seen, self.cap)


@dataclass(frozen=True)
class Asked:
    """Questions with the greedy answers of the model that has the whole text.

    Attributes
    ----------
    queries, answers : list of list of int
        Token ids.
    hidden : Tensor, shape (answer tokens, d)
        Hidden states that predict the tokens of all answers, one answer after the other.
    """

    queries: list[list[int]]
    answers: list[list[int]]
    hidden: Tensor

    @classmethod
    def read(cls, backbone: Backbone, prefix: Prefix, queries: list[list[int]], answers: list[list[int]]) -> Asked:
        """Read questions with their answers after a prefix of one row."""
        pairs = zip(queries, answers, strict=True)
        states = [read(backbone, prefix, [*query, *answer])[len(query) - 1 : -1] for query, answer in pairs]
        return cls(queries, answers, torch.cat([prefix.last.new_zeros(0, backbone.width), *states]))

    def each(self) -> Iterator[Asked]:
        """The questions one by one."""
        states = self.hidden.split([len(answer) for answer in self.answers])
        for query, answer, hidden in zip(self.queries, self.answers, states, strict=True):
            yield Asked([query], [answer], hidden)

    def split(self, part: int) -> tuple[Asked, Asked]:
        """Two parts: one question in `part`, and the rest."""
        every = list(self.each())
        first, rest = every[::part], [one for number, one in enumerate(every) if number % part]
        return Asked.join(first), Asked.join(rest)

    @classmethod
    def join(cls, parts: Sequence[Asked]) -> Asked:
        """All questions of several parts."""
        queries, answers = ([one for part in parts for one in getattr(part, name)] for name in ("queries", "answers"))
        return cls(queries, answers, torch.cat([part.hidden for part in parts]))


@dataclass(frozen=True)
class Text:
    """A text that was read whole.

    Attributes
    ----------
    ids : list of int
        Tokens of the text itself.
    whole : Entries
        Its cache, with what the task puts before it.
    references : References
    study : Asked
        Questions that writers may fit to.
    held_out : Asked
        Questions that no writer sees.
    """

    ids: list[int]
    whole: Entries
    references: References
    study: Asked
    held_out: Asked


def read_text(backbone: Backbone, task: Task, ids: list[int], questions: Sequence[str] = ()) -> Text:
    """Read a text whole, let the model answer questions about it, and note what it looks for.

    Parameters
    ----------
    backbone : Backbone
    task : Task
        It says what stands before a text and around a question.
    ids : list of int
        Tokens of the text.
    questions : sequence of str
        The user's own questions, besides those that fit any text. Every fourth is held out.
    """
    with torch.no_grad():
        prefix = whole_prefix(backbone, task, ids)
        (study, answers), held_out = stock_questions(backbone, task, prefix, questions)
        known, repeat = Asked.read(backbone, prefix, *held_out), repeat_query(task)
        told = [repeat + ids, *(query + answer for query, answer in continuations(task, ids))]
        observer = _Observer(prefix.length, sum(map(len, [*told, *study, *answers])))
        with head_attention(backbone.model, observer=observer):
            studied = Asked.read(backbone, prefix, study, answers)
            for sequence in told:
                read(backbone, prefix, sequence)
        whole = Entries.of_prefix(prefix)
        return Text(list(ids), whole, observer.found(whole.keys, whole.values), studied, known)


def read_repeated(backbone: Backbone, task: Task, ids: list[int]) -> Text:
    """Read a text whole, and note what the model looks for when it repeats the text: what training has time for.

    Gradients pass through the cache of the text, and not through the repetition.
    """
    prefix, repeat = whole_prefix(backbone, task, ids), repeat_query(task)
    whole = Entries.of_prefix(prefix)
    with torch.no_grad():
        observer = _Observer(prefix.length, len(repeat) + len(ids))
        with head_attention(backbone.model, observer=observer):
            read(backbone, prefix, repeat + ids)
        references = observer.found(whole.keys.detach(), whole.values.detach())
    none = Asked([], [], prefix.last.new_zeros(0, backbone.width))
    return Text(list(ids), whole, references, none, none)


def stock_questions(backbone: Backbone, task: Task, prefix: Prefix, questions: Sequence[str]) -> tuple[Pairs, Pairs]:
    """Questions that fit any text and the user's own, with greedy answers: those to fit to, and those held out.

    Parameters
    ----------
    backbone : Backbone
    task : Task
    prefix : Prefix
        The whole text.
    questions : sequence of str
        The user's own questions. Every fourth is held out.
    """
    own = [task.encode_query(question) for question in questions]
    held_out = [*encoded(task, HELD_OUT), *own[3::4]]
    study = [*encoded(task, STOCK), *(query for i, query in enumerate(own) if i % 4 != 3)]
    answers = greedy_answers(backbone, task, prefix, [*held_out, *study])
    return (study, answers[len(held_out) :]), (held_out, answers[: len(held_out)])


def encoded(task: Task, questions: Sequence[str]) -> list[list[int]]:
    """Token ids of the questions that the task knows how to ask: one of key-value pairs takes none in plain words."""
    found = []
    for question in questions:
        with suppress(GradmemError):
            found.append(task.encode_query(question))
    return found


def repeat_query(task: Task) -> list[int]:
    """Token ids that ask for the text itself; empty if the task cannot ask for it, and a text just begins again."""
    return next(iter(encoded(task, [REPEAT])), [])


def continuations(task: Task, ids: list[int]) -> list[tuple[list[int], list[int]]]:
    """Questions for the second half of each sentence, with that half: so each fact is asked for once."""
    found = []
    for sentence in re.split(r"(?<=[.!?])\s+", task.text(ids)):
        words = sentence.split()
        begin, rest = (" ".join(part) for part in (words[: len(words) // 2], words[len(words) // 2 :]))
        if len(words) >= SHORTEST and (query := encoded(task, [CLOZE.format(begin)])):
            found.append((query[0], task.encode(rest)))
    return found


def whole_prefix(backbone: Backbone, task: Task, ids: list[int]) -> Prefix:
    """Run a text, with what the task puts before it; both may be empty."""
    given = torch.tensor([[*task.before_context, *ids]], dtype=torch.long, device=backbone.model.device)
    embeds = backbone.embed(given)
    if not embeds.shape[1]:
        return Prefix(embeds.new_zeros(1, backbone.width), backbone.new_cache())
    return backbone.prefix(embeds)


def read(backbone: Backbone, prefix: Prefix, ids: list[int]) -> Tensor:
    """Hidden states of tokens after a prefix of one row: shape (tokens, d)."""
    device = prefix.last.device
    own = prefix.select(torch.zeros(1, dtype=torch.long, device=device))
    with own.active():
        embeds = backbone.embed(torch.tensor([ids], device=device))
        return backbone.hidden(embeds, own.cache, **own.continued(len(ids)))[0]


def greedy_answers(backbone: Backbone, task: Task, prefix: Prefix, queries: list[list[int]]) -> list[list[int]]:
    """Let the model answer after a prefix of one row; each answer is up to its end token, or cut off."""
    if not queries:
        return []
    rows = torch.zeros(len(queries), dtype=torch.long, device=prefix.last.device)
    options: dict[str, Any] = task.greedy_options() | {"max_new_tokens": ANSWER}
    found = generate(backbone, prefix.select(rows), queries, task.pad_id, **options)
    return [ids[: ids.index(task.end_id) + 1] if task.end_id in ids else ids for ids in found]


class _Observer:
    """Notes the queries of tokens that are read after the text.

    Parameters
    ----------
    first : int
        Entries of the text.
    tokens : int
        Tokens that will be read in all; if these are too many, a random part of them is noted.
    """

    def __init__(self, first: int, tokens: int) -> None:
        self.first, self.share = first, min(1.0, MOST_QUERIES / tokens)
        self.layers: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
        self.cap: float | None = None
        self.generator = torch.Generator().manual_seed(0)
        self.chosen = torch.zeros(0, dtype=torch.long)

    def __call__(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> None:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        length, heads = query.shape[2], key.shape[1]
        if layer == 0:
            count = max(1, round(self.share * length))
            self.chosen = torch.randperm(length, generator=self.generator)[:count].sort().values.to(query.device)
        self.cap = options.get("softcap")
        queries = scaled_queries(query[0, :, self.chosen], heads, options)
        own = scores(queries, wide(key[0, :, self.first :]), self.cap)
        later = torch.arange(length, device=query.device) > self.chosen[:, None]
        own = own.masked_fill(later, -torch.inf)
        output = torch.einsum("hrnm,hmd->hrnd", own.softmax(-1), wide(value[0, :, self.first :]))
        self.layers.setdefault(layer, []).append((queries, own.logsumexp(-1), output))

    def found(self, keys: Tensor, values: Tensor) -> References:
        """What the noted queries find in keys and values of shape (layers, key-value heads, entries, width)."""
        layers = []
        for layer in range(len(keys)):
            queries, mass, output = (torch.cat(parts, 2) for parts in zip(*self.layers.pop(layer), strict=True))
            inside, outside = attention(queries, mass, wide(keys[layer]), self.cap)
            wanted = torch.einsum("hrnm,hmd->hrnd", inside, wide(values[layer])) + outside[..., None] * output
            layers.append((queries, mass, output, wanted, inside.square().mean(2)))
        queries, mass, output, wanted, seen = map(torch.stack, zip(*layers, strict=True))
        return References(queries, mass, output, wanted, seen, self.cap)


def scaled_queries(query: Tensor, heads: int, options: dict[str, Any]) -> Tensor:
    """Queries (query heads, queries, width) times the scale of their scores, by the key-value head that they share.

    `options` are those that a model gives to its attention.
    """
    scaling = options.get("scaling")
    return wide(query * (query.shape[-1] ** -0.5 if scaling is None else scaling)).unflatten(0, (heads, -1))


def scores(queries: Tensor, keys: Tensor, cap: float | None) -> Tensor:
    """Attention scores (..., query heads, queries, entries) of scaled queries (..., query heads, queries, width)."""
    found = torch.einsum("...rnd,...md->...rnm", queries, keys)
    return found if cap is None else cap * (found / cap).tanh()


def attention(
    queries: Tensor, mass: Tensor, keys: Tensor, cap: float | None, unused: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention to entries, and to all that is outside of them.

    Parameters
    ----------
    queries : Tensor, shape (..., query heads, queries, width)
        Already scaled.
    mass : Tensor, shape (..., query heads, queries)
        Log of the mass outside.
    keys : Tensor, shape (..., entries, width)
    cap : float, optional
    unused : Tensor, bool, shape (..., entries), optional
        Places without an entry.

    Returns
    -------
    inside : Tensor, shape (..., query heads, queries, entries)
    outside : Tensor, shape (..., query heads, queries)
    """
    found = scores(queries, keys, cap)
    if unused is not None:
        found = found.masked_fill(unused[..., None, None, :], -torch.inf)
    total = torch.logaddexp(found.logsumexp(-1), mass)
    return (found - total[..., None]).exp(), (mass - total).exp()
