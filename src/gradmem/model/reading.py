"""Read a memory: answers with their evidence, and the texts that it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..batch import Tokens
from ..errors import GradmemError
from ..generation import copies
from ..memory import LENGTHS, Memory
from ..methods.base import Method
from ..prefix import Prefix
from ..progress import Progress, silent
from ..tasks.base import Task


@dataclass(frozen=True)
class Answer:
    """An answer with its evidence. The tokens of an answer include the end token.

    Attributes
    ----------
    text : str
    logprob, lowest : float
        Mean and lowest log-probability of the answer's tokens under the model and the memory, nats.
    margin : float
        Log-probability of the likeliest first token minus that of the second, nats.
    near_loss : float or None
        Statement loss: mean token loss under the memory, nats, of the text that states this answer to this query
        (`Task.statement`), measured as a write receipt measures a context. It can be compared with the receipt's
        `loss_after`, and needs nothing of the context itself. None if an upstream server answered.
    written : float or None
        Probability that this answer to this query was written, if half of all answers were. None if the checkpoint is
        not calibrated (`gradmem calibrate`), for contexts of other lengths than it was calibrated for, and if text was
        appended.
    abstained : bool or None
        Whether that probability is below the threshold: better show "not in this memory" than the text.
    finish_reason : {"stop", "length"}
        "stop" if the answer ended by itself or at a text that ends it, "length" if it was cut off at the most tokens
        that it may have.
    query_tokens, answer_tokens : int
        Number of tokens read and generated.
    """

    text: str
    logprob: float
    lowest: float
    margin: float
    near_loss: float | None
    written: float | None = None
    abstained: bool | None = None
    finish_reason: Literal["stop", "length"] = "stop"
    query_tokens: int = 0
    answer_tokens: int = 0


def generate(
    method: Method, task: Task, prefix: Prefix, rows: list[int], queries: list[list[int]], options: dict[str, Any]
) -> list[list[int]]:
    """Generate the new tokens of each query, greedily unless the options say otherwise.

    Parameters
    ----------
    method : Method
    task : Task
    prefix : Prefix
        Of the memory.
    rows : list of int
        The row of the memory that each query asks.
    queries : list of list of int
        Token ids, from `TextEncoder.query_ids`.
    options : dict
        Those of `gradmem.generation.OPTIONS`, and `control`, a `RowControl`.
    """
    index = torch.tensor(rows, device=method.device)
    return method.generate(prefix, queries, index, pad_id=task.pad_id, **(task.greedy_options() | options))


def answer(
    method: Method,
    task: Task,
    memory: Memory,
    prefix: Prefix,
    rows: list[int],
    queries: list[list[int]],
    options: dict[str, Any],
) -> tuple[list[Answer], Tensor]:
    """Answer queries, and measure the evidence for each answer.

    Parameters
    ----------
    memory : Memory
    method, task, prefix, rows, queries, options
        As for `generate`.

    Returns
    -------
    answers : list of Answer
        Without `written` and `abstained`, which `Abstain.judge` adds.
    states : Tensor, shape (answers, 2 d)
        Hidden states, from which `Abstain.judge` judges the answers.

    Raises
    ------
    GradmemError
        If the options ask for several answers to a query.
    """
    if copies(options) > 1:
        raise GradmemError("`answer` gives one answer for each query: use `ask` for beams and several sequences")
    ends = set(task.end_ids)
    ids = [_up_to_end(row, ends) for row in generate(method, task, prefix, rows, queries, options)]
    whole = [task.decode(row) for row in ids]
    control = options.get("control")
    texts = whole if control is None else [control.cut(row, text) for row, text in enumerate(whole)]
    stated = [task.statement(task.text(query), text) for query, text in zip(queries, texts, strict=True)]
    statements = [task.encode(one) or [task.end_id] for one in stated]  # an empty text is no more than its end
    with torch.no_grad():
        index = torch.tensor(rows, device=method.device)
        logprobs, states = zip(*read_answers(method, prefix.select(index), queries, ids), strict=True)
        losses = statement_losses(method, memory.select(rows), statements)
    answers = [
        replace(
            answer,
            finish_reason="stop" if row[-1] in ends or answer.text != text else "length",
            query_tokens=len(query),
            answer_tokens=len(row),
        )
        for answer, text, query, row in zip(map(assess, texts, ids, logprobs, losses), whole, queries, ids, strict=True)
    ]
    return answers, torch.stack(states)


def _up_to_end(ids: list[int], ends: set[int]) -> list[int]:
    """Generated tokens up to the first that ends the answer."""
    last = next((at for at, one in enumerate(ids) if one in ends), len(ids))
    return ids[: last + 1]


def read_answers(
    method: Method, prefix: Prefix, queries: list[list[int]], answers: list[list[int]]
) -> list[tuple[Tensor, Tensor]]:
    """Read given answers after their queries, in one pass.

    Parameters
    ----------
    method : Method
    prefix : Prefix
        One row for each query.
    queries, answers : list of list of int
        Token ids, at least one each.

    Returns
    -------
    list of tuple of Tensor
        For each answer, the log-probabilities of the whole vocabulary at each of its tokens, shape (answer tokens,
        vocabulary), and the hidden states that predict its first and its last token, shape (2 d,).
    """
    device = prefix.last.device
    tokens = Tokens.from_lists([query + answer for query, answer in zip(queries, answers, strict=True)]).to(device)
    lengths = torch.tensor([len(query) for query in queries], device=device)
    asked = tokens.mask & (torch.arange(tokens.ids.shape[1], device=device) >= lengths[:, None])
    hidden = method.read_hidden(prefix, tokens)[:, :-1][asked].split([len(answer) for answer in answers])
    return [(method.backbone.head(own).float().log_softmax(-1), own[[0, -1]].float().flatten()) for own in hidden]


def statement_losses(method: Method, memory: Memory, statements: list[list[int]]) -> list[float]:
    """Mean token loss of one text under each row of a memory, measured as a write receipt does, nats.

    If the chunks of a context have vectors of their own, one of them is enough to hold the text: the least loss counts.

    Parameters
    ----------
    method : Method
    memory : Memory
    statements : list of list of int
        Token ids, one text for each row.
    """
    parts = method.split_chunks(memory)
    counts = memory.tensors[LENGTHS].tolist() if len(parts) > len(memory) else [1] * len(memory)
    every = [statement for statement, count in zip(statements, counts, strict=True) for _ in range(count)]
    tokens = Tokens.from_lists(every).to(method.device)
    losses = _losses(method, parts, tokens).detach().float().sum(1) / tokens.lengths
    return [float(own.min()) for own in losses.split(counts)]


def assess(text: str, ids: list[int], logprobs: Tensor, near_loss: float) -> Answer:
    """Build an answer from what `read_answers` and `statement_losses` measured."""
    taken = logprobs.gather(1, torch.tensor(ids, device=logprobs.device)[:, None])[:, 0]
    first, second = logprobs[0].topk(2).values.tolist()
    return Answer(text, float(taken.mean()), float(taken.min()), first - second, near_loss)


def text_losses(method: Method, memory: Memory, context: Tokens) -> Tensor:
    """Loss of each token of texts as `read_back` reads them: shape (batch, length), nats.

    Parameters
    ----------
    method : Method
    memory : Memory
    context : Tokens, shape (batch, length)
        The texts that were written, one for each text of the memory.
    """
    parts, cuts = method.split_chunks(memory), method.chunk_lengths(context)
    cuts = [own or [int(length)] for own, length in zip(cuts, context.lengths, strict=True)]
    if not _whole_query(method) or len(parts) != sum(map(len, cuts)):
        return method.token_losses(memory, context)
    chunks = [chunk for row, own in zip(context.ids, cuts, strict=True) for chunk in row[: sum(own)].split(own)]
    tokens = Tokens.from_lists([chunk.tolist() for chunk in chunks], method.task.pad_id).to(method.device)
    rows = iter(_losses(method, parts, tokens))
    whole = [torch.cat([next(rows)[:length] for length in own]) for own in cuts]
    return pad_sequence(whole, batch_first=True)


def _losses(method: Method, memory: Memory, texts: Tokens) -> Tensor:
    """Loss of each token of a text under each row: as READ answers the query for the whole text, or as WRITE reads."""
    query = _whole_query(method)
    return method.repeat_losses(method.prefix(memory), texts, query) if query else method.token_losses(memory, texts)


def _whole_query(method: Method) -> list[int]:
    return method.task.whole_query if method.task else []


def read_back(method: Method, memory: Memory, progress: Progress = silent) -> list[list[int]]:
    """Token ids that a memory gives back, as many as were written; see `Method.reconstruct`.

    Parameters
    ----------
    method : Method
    memory : Memory
    progress : callable
        See `gradmem.progress.Progress`.

    Returns
    -------
    list of list of int
        For each text that was written, as in `Memory.history`.

    Raises
    ------
    GradmemError
        If the memory has no receipts, a receipt states more tokens than the model can write, or several chunks were
        written into the same vectors.
    """
    cuts = [part.chunks or [part.context_tokens] for part in memory.history]
    lengths = [length for own in cuts for length in own]
    if not lengths:
        raise GradmemError("the memory has no receipt that says how many tokens were written")
    if not all(isinstance(length, int) and 1 <= length <= method.max_chunk for length in lengths):
        raise GradmemError(f"the memory is damaged: it cannot hold contexts of {max(lengths, key=abs)} tokens")
    parts = method.split_chunks(memory)
    if len(parts) != len(lengths):
        raise GradmemError(
            f"the memory has {len(lengths)} chunks in the vectors of {len(parts)}, which cannot be told apart: "
            "ask it, or write with `chunk_mode: independent` to read texts back"
        )
    query = _whole_query(method)
    size = method.backbone.contexts_at_once(max(lengths))
    starts = range(0, len(lengths), size)
    found: list[list[int]] = []
    for first in progress(starts, title="reading back", total=len(starts)):
        rows = range(first, min(first + size, len(lengths)))
        some, own = parts.select(rows), [lengths[row] for row in rows]
        found += method.repeat(some, own, query) if query else method.reconstruct(some, own)
    pieces = iter(found)
    return [[token for _ in own for token in next(pieces)] for own in cuts]


def in_shape(memory: Memory, query: Any, answered: Callable[[list[int], list[str]], list[Any]]) -> Any:
    """Answer queries in the shape in which they are given.

    Parameters
    ----------
    memory : Memory
    query : str, list of str, or list of lists of str
        One query; several for a memory of one row; or for each row a list of its own.
    answered : callable
        Answers a flat list: memory rows, and their queries.

    Raises
    ------
    GradmemError
        If rows and queries do not fit together.
    """
    if isinstance(query, str):
        return in_shape(memory, [query], answered)[0]
    if query and isinstance(query[0], str):
        if len(memory) != 1:
            raise GradmemError(f"this memory has {len(memory)} rows: give a list of queries for each, or pick one")
        return in_shape(memory, [query], answered)[0]
    if len(query) != len(memory):
        raise GradmemError(f"{len(query)} lists of queries for {len(memory)} memories: give one for each")
    flat = [(row, text) for row, texts in enumerate(query) for text in texts]
    found = iter(answered([row for row, _ in flat], [text for _, text in flat]) if flat else [])
    return [[next(found) for _ in queries] for queries in query]
