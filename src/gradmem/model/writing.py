"""Write texts into memories: in batches, with a receipt each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from ..batch import Tokens
from ..errors import GradmemError
from ..memory import Memory
from ..methods.base import Method, Written, last_state
from ..progress import Progress
from ..receipts import Author, Receipt, questions_digest, text_digest, written_texts
from ..tasks.base import Task
from .reading import read_answers, text_losses

MOST_STEPS = 30
"""Most write steps of `until` if nothing else is said."""


def write_texts(
    method: Method,
    task: Task,
    texts: list[str],
    ids: list[list[int]],
    author: Author,
    *,
    onto: Memory | None = None,
    steps: int,
    until: float | None,
    progress: Progress,
) -> Memory:
    """Write texts into new memories or onto existing ones, as many at once as fit.

    Parameters
    ----------
    method : Method
    task : Task
    texts : list of str
        One for each row of `onto`, if that is given.
    ids : list of list of int
        The texts' token ids, from `TextEncoder.context_ids`.
    author : Author
        Who writes, for the receipts.
    onto : Memory, optional
        Memories to append to; they are unchanged.
    steps : int
        Write steps; with `until` the most of them.
    until : float, optional
        Write loss (mean nats per token) at which each text stops.
    progress : callable
        See `gradmem.progress.Progress`.

    Returns
    -------
    Memory
        One row with a receipt for each text.

    Raises
    ------
    GradmemError
        If there are no texts.
    """
    if not texts:
        raise GradmemError("there is no text to write")
    size = method.texts_at_once(max(map(len, ids)))
    parts = []
    for first in range(0, len(texts), size):
        last = min(first + size, len(texts))

        def shown(states: Iterable[Written], turns: int, last: int = last) -> Iterable[Written]:
            return progress(states, title=f"writing {last} of {len(texts)}", total=turns * steps + 1)

        some = None if onto is None else onto.select(range(first, last))
        parts.append(_write_batch(method, task, texts[first:last], ids[first:last], author, some, steps, until, shown))
    return Memory.join(parts)


def _write_batch(
    method: Method,
    task: Task,
    texts: list[str],
    ids: list[list[int]],
    author: Author,
    onto: Memory | None,
    steps: int,
    until: float | None,
    progress: Callable[[Iterable[Written], int], Iterable[Written]],
) -> Memory:
    context = Tokens.from_lists(ids, task.pad_id).to(method.device)
    cuts = method.chunk_lengths(context)
    turns = max(1, *map(len, cuts)) if method.chunk_mode in ("sequential", "growing") else 1
    with torch.no_grad():
        if onto is None:
            states = method.trajectory(context, steps, until=until)
        else:
            states = method.extend(onto, context, steps, until=until)
        written = last_state(progress(states, turns))
        losses = text_losses(method, written.memory, context)
    memory = written.memory if onto is None else method.merge(onto, written.memory)
    answers = answer_losses(method, task, memory, texts)
    receipts = [
        replace(
            _receipt(method, author, text, written, losses[row, : len(ids[row])].tolist(), row),
            chunks=cuts[row],
            earlier=[] if onto is None else [_since(part, method) for part in onto.receipts[row].history],
            answers=answers[row],
            fidelity=None if written.fidelity is None else written.fidelity[row],
        )
        for row, text in enumerate(texts)
    ]
    return Memory(memory.tensors, receipts)


def _receipt(
    method: Method, author: Author, text: str, written: Written, token_losses: list[float], row: int
) -> Receipt:
    taken = int(written.taken[row])
    return Receipt(
        **vars(author),
        context_sha256=text_digest(text),
        context_tokens=len(token_losses),
        questions_sha256=questions_digest(method.questions or ()),
        steps=taken,
        inner_lr=[round(rate, 6) for rate in method.inner_lrs()],
        losses=_rounded([*written.losses[:taken, row].tolist(), _mean(token_losses)], 6),
        token_losses=_rounded(token_losses, 3),
    )


def _since(part: Receipt, method: Method) -> Receipt:
    """What a receipt still says after more was written: READ sees another memory, whose vectors may have changed."""
    return replace(part, earlier=[], answers=None, measured=part.measured and method.grows)


def answer_losses(method: Method, task: Task, memory: Memory, texts: Sequence[str]) -> list[list[float]]:
    """Ask each row of a memory every query that the task finds in its text; see `Receipt.answers`."""
    asked = [(row, *task.target(*one)) for row, text in enumerate(texts) for one in task.examples(text)]
    found: list[list[float]] = [[] for _ in texts]
    if not asked:
        return found
    with torch.no_grad():
        prefix = method.prefix(memory)
        longest = prefix.length + max(len(query) + len(target) for _, query, target in asked)
        size = method.backbone.contexts_at_once(longest)
        for first in range(0, len(asked), size):
            rows, queries, targets = (list(part) for part in zip(*asked[first : first + size], strict=True))
            some = prefix.select(torch.tensor(rows, device=method.device))
            for row, target, (logprobs, _) in zip(
                rows, targets, read_answers(method, some, queries, targets), strict=True
            ):
                labels = torch.tensor([target], device=logprobs.device)
                losses = -logprobs.gather(1, labels.T)[:, 0][task.scored(labels)[0]]
                found[row].append(round(float(losses.max()), 3))
    return found


def token_losses(method: Method, memory: Memory, ids: list[int]) -> list[float]:
    """Loss of each context token when the context is read back from a memory of one row, nats."""
    context = Tokens.from_lists([ids]).to(method.device)
    with torch.no_grad():
        losses: list[float] = text_losses(method, memory, context)[0].tolist()
    return losses


def measure_again(
    method: Method, task: Task, memory: Memory, before: str, context_ids: Callable[[str], list[int]]
) -> Receipt:
    """The receipt of a memory of one row, with what the memory still keeps of earlier texts.

    Parameters
    ----------
    method : Method
    task : Task
    memory : Memory
    before : str
        All earlier texts, one after the other, or one of them.
    context_ids : callable
        Token ids of a context text.

    Raises
    ------
    GradmemError
        If `before` is not what was written.
    """
    receipt = memory.receipts[0]
    found = written_texts(before, receipt.earlier, "`before`")
    earlier = []
    for part in receipt.earlier:
        if (text := found.get(part.context_sha256)) is not None:
            part = replace(part, answers=answer_losses(method, task, memory, [text])[0])
            if not method.grows:  # if it does, the text has a memory of its own, which has not changed
                losses = token_losses(method, memory, context_ids(text))
                last, tokens = _rounded([_mean(losses)], 6), _rounded(losses, 3)
                part = replace(part, losses=[*part.losses[:-1], *last], token_losses=tokens, measured=True)
        earlier.append(part)
    return replace(receipt, earlier=earlier)


@contextmanager
def asking(method: Method, questions: Sequence[str]) -> Iterator[None]:
    """Give a method the user's own questions while it writes.

    Raises
    ------
    GradmemError
        If it takes none.
    """
    if not questions:
        yield
        return
    if method.questions is None:
        raise GradmemError(
            "only the methods compact and vectors fit memories to questions: leave them out, or choose one of them"
        )
    method.questions = questions
    try:
        yield
    finally:
        method.questions = ()


def most_steps(method: Method, steps: int | None, until: float | None, max_steps: int | None) -> int:
    """Write steps that these arguments of `MemoryModel.write` ask for; with `until`, the most of them.

    Raises
    ------
    GradmemError
        If `steps` and `until` are both given, or `until` is not a positive loss.
    """
    if until is None:
        return method.write_steps if steps is None else steps
    if steps is not None:
        raise GradmemError("give `steps` or `until`, not both")
    if not until > 0:
        raise GradmemError(f"`until` must be a loss above 0, not {until}")
    return max(MOST_STEPS, method.write_steps) if max_steps is None else max_steps


def finished_rows(
    author: Author,
    texts: Sequence[str],
    earlier: Memory,
    steps: int,
    until: float | None,
    questions: Sequence[str] = (),
) -> list[Memory | None]:
    """Find what an earlier memory already holds of some texts.

    Parameters
    ----------
    author : Author
        Who would write them now.
    texts : sequence of str
    earlier : Memory
    steps : int
        Write steps; with `until` the most of them.
    until : float, optional
        As for `write_texts`.
    questions : sequence of str
        The user's own questions.

    Returns
    -------
    list of Memory or None
        For each text the row that was written from it, by the same author, with the same questions, and with as many
        steps or down to the same loss; None if there is none.
    """
    asked = questions_digest(questions)
    rows = {
        receipt.context_sha256: earlier[row]
        for row, receipt in enumerate(earlier.receipts)
        if _same_author(author, receipt)
        and not receipt.earlier
        and receipt.questions_sha256 == asked
        and (receipt.steps == steps if until is None else receipt.complete(steps, until))
    }
    return [rows.get(text_digest(text)) for text in texts]


def _same_author(author: Author, receipt: Receipt) -> bool:
    """Whether two authors write the same; the name of a model may be another path to the same one."""
    return all(getattr(receipt, name) == value for name, value in vars(author).items() if name != "model")


def as_texts(text: str | Sequence[str], memory: Memory | None = None, what: str = "there are") -> list[str]:
    """Texts as a list, one for each row of the memory if there is one.

    Raises
    ------
    GradmemError
        If the numbers of texts and rows differ.
    """
    texts = [text] if isinstance(text, str) else list(text)
    if memory is not None and len(texts) != len(memory):
        raise GradmemError(f"{what} {len(texts)} texts for {len(memory)} memories: give one for each")
    return texts


def _mean(losses: list[float]) -> float:
    return sum(losses) / len(losses)


def _rounded(losses: Iterable[float], digits: int) -> list[float]:
    return [round(loss, digits) for loss in losses]
