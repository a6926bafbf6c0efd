"""Write texts into memories through a model: in batches, with a receipt each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ..batch import Tokens
from ..errors import GradmemError
from ..memory import Memory
from ..methods.base import Method, Written, last_state
from ..receipts import Receipt, text_digest, written_texts
from .abstain import read_answers

if TYPE_CHECKING:
    from .model import MemoryModel

Progress = Callable[..., Iterable[Any]]
"""`progress(steps, title, total)` passes steps on and may show them, as `rich.progress.track` does."""


def write_texts(
    model: MemoryModel,
    texts: list[str],
    onto: Memory | None,
    steps: int,
    until: float | None,
    progress: Progress,
) -> Memory:
    """Write texts, as many at once as is good; onto memories where these are given.

    Parameters
    ----------
    model : MemoryModel
    texts : list of str
        One for each row of `onto`, where that is given.
    onto : Memory, optional
    steps : int
        Write steps, or with `until` the most of them.
    until : float, optional
        Write loss (mean nats per token) at which each text stops.
    progress : callable

    Returns
    -------
    Memory
        One row for each text, with its receipt; bound to the model.

    Raises
    ------
    GradmemError
        When there are no texts, or one is empty, too long or has unknown characters.
    """
    if not texts:
        raise GradmemError("nothing to write")
    ids = [model.context_ids(text) for text in texts]
    size = max(1, model.method.backbone.tokens_at_once // max(map(len, ids)))
    parts = []
    for first in range(0, len(texts), size):
        last = min(first + size, len(texts))

        def shown(states: Iterable[Written], turns: int, last: int = last) -> Iterable[Written]:
            return progress(states, title=f"writing {last} of {len(texts)}", total=turns * steps + 1)

        some = None if onto is None else onto.select(range(first, last))
        parts.append(_write_batch(model, texts[first:last], ids[first:last], some, steps, until, shown))
    memory = Memory.join(parts)
    memory.model = model
    return memory


def _write_batch(
    model: MemoryModel,
    texts: list[str],
    ids: list[list[int]],
    onto: Memory | None,
    steps: int,
    until: float | None,
    progress: Callable[[Iterable[Written], int], Iterable[Written]],
) -> Memory:
    context, method = Tokens.from_lists(ids, model.task.pad_id).to(model.device), model.method
    cuts = method.chunk_lengths(context)
    turns = max(1, *map(len, cuts)) if method.chunk_mode == "sequential" else 1
    with torch.no_grad():
        if onto is None:
            states = method.trajectory(context, steps, until=until)
        else:
            states = method.extend(onto, context, steps, until=until)
        written = last_state(progress(states, turns))
        token_losses = method.token_losses(written.memory, context)
    receipts = []
    for row, text in enumerate(texts):
        losses = token_losses[row, : len(ids[row])].tolist()
        earlier = [] if onto is None else [_since(part, method) for part in onto.receipts[row].history]
        receipts.append(_record(model, text, written, losses, row, cuts[row], earlier))
    memory = written.memory if onto is None else method.merge(onto, written.memory)
    answers = answer_losses(model, memory, texts)
    receipts = [replace(receipt, answers=own) for receipt, own in zip(receipts, answers, strict=True)]
    return Memory(memory.tensors, receipts)


def _since(part: Receipt, method: Method) -> Receipt:
    """What is known of a text after another was appended: READ sees another memory, which WRITE may have changed."""
    return replace(part, earlier=[], answers=None, measured=part.measured and method.chunk_mode == "independent")


def answer_losses(model: MemoryModel, memory: Memory, texts: Sequence[str]) -> list[list[float]]:
    """Ask each row of a memory for all that the task knows its text to answer; see `Receipt.answers`."""
    task, method = model.task, model.method
    asked = [(row, *task.target(*one)) for row, text in enumerate(texts) for one in task.examples(text)]
    found: list[list[float]] = [[] for _ in texts]
    if not asked:
        return found
    with torch.no_grad():
        prefix = method.prefix(memory)
        longest = prefix.length + max(len(query) + len(target) for _, query, target in asked)
        size = max(1, method.backbone.tokens_at_once // longest)
        for first in range(0, len(asked), size):
            rows, queries, targets = (list(part) for part in zip(*asked[first : first + size], strict=True))
            some = prefix.select(torch.tensor(rows, device=model.device))
            for row, target, (logprobs, _) in zip(
                rows, targets, read_answers(method, some, queries, targets), strict=True
            ):
                labels = torch.tensor([target], device=logprobs.device)
                losses = -logprobs.gather(1, labels.T)[:, 0][task.scored(labels)[0]]
                found[row].append(round(float(losses.max()), 3))
    return found


def _record(
    model: MemoryModel,
    text: str,
    written: Written,
    token_losses: list[float],
    row: int,
    chunks: list[int],
    earlier: list[Receipt],
) -> Receipt:
    taken = int(written.taken[row])
    losses = [*written.losses[:taken, row].tolist(), _mean(token_losses)]
    prints = model.fingerprints
    return Receipt(
        method=model.spec["method"]["name"],
        model=model.name,
        backbone=prints["backbone"],
        checkpoint=prints["checkpoint"],
        tokenizer=prints["tokenizer"],
        context_sha256=text_digest(text),
        context_tokens=len(token_losses),
        steps=taken,
        inner_lr=[round(rate, 6) for rate in model.method.inner_lrs()],
        losses=_rounded(losses, 6),
        token_losses=_rounded(token_losses, 3),
        options=model.method_options,
        chunks=chunks,
        earlier=earlier,
    )


def measure_again(model: MemoryModel, memory: Memory, before: str) -> Receipt:
    """The receipt of a memory of one row, with what it still keeps of the texts `before`.

    Raises
    ------
    GradmemError
        When `before` is not what was written.
    """
    receipt = memory.receipts[0]
    found = written_texts(before, receipt.earlier, "`before`")
    earlier = []
    for part in receipt.earlier:
        if (text := found.get(part.context_sha256)) is not None:
            part = replace(part, answers=answer_losses(model, memory, [text])[0])
            if model.method.chunk_mode != "independent":  # vectors of their own have not changed
                losses = model.token_losses(memory, text)
                last, tokens = _rounded([_mean(losses)], 6), _rounded(losses, 3)
                part = replace(part, losses=[*part.losses[:-1], *last], token_losses=tokens, measured=True)
        earlier.append(part)
    return replace(receipt, earlier=earlier)


def as_texts(text: str | Sequence[str], memory: Memory | None = None, what: str = "there are") -> list[str]:
    """Texts as a list; refused unless there is one for each row of the memory, where there is one."""
    texts = [text] if isinstance(text, str) else list(text)
    if memory is not None and len(texts) != len(memory):
        raise GradmemError(f"{what} {len(texts)} texts for {len(memory)} memories: give one for each")
    return texts


def _mean(losses: list[float]) -> float:
    return sum(losses) / len(losses)


def _rounded(losses: Iterable[float], digits: int) -> list[float]:
    return [round(loss, digits) for loss in losses]
