"""Tables of memories and receipts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from ..receipts import Receipt, text_digest

if TYPE_CHECKING:
    from ..memory import Memory
    from ..model import BoundMemory
    from ..tasks.base import Task


def provenance_table(receipt: Receipt, memory: Memory, path: Path) -> Table:
    """Build a table of the checkpoint, the context and the size of a memory."""
    built = Table(title=str(path), show_header=False)
    # Those of all layers are alike, but for their numbers.
    alike = Counter((re.sub(r"\d+", "*", name), tuple(tensor.shape)) for name, tensor in memory.tensors.items())
    shapes = ", ".join(
        f"{name} {shape}" + (f" x {count}" if count > 1 else "") for (name, shape), count in alike.items()
    )
    lr = f"{min(receipt.inner_lr):.4g} to {max(receipt.inner_lr):.4g}" if receipt.inner_lr else "none"
    rows = {
        "written by": f"{receipt.method}, checkpoint '{receipt.model}'",
        "checkpoint": receipt.checkpoint,
        "backbone": receipt.backbone,
        "tokenizer": receipt.tokenizer,
        "context SHA-256": receipt.context_sha256,
        "context": f"{receipt.context_tokens} tokens" + (f" in {len(receipt.chunks)} chunks" if receipt.chunks else ""),
        "tensors": f"{shapes}; {path.stat().st_size} bytes in the file",
        "steps": f"{receipt.steps}, inner learning rate {lr}",
        "write loss": f"{receipt.loss_before:.4f} before, {receipt.loss_after:.4f} after"
        + ("" if receipt.measured else ", not measured since more was written"),
    }
    for name, value in rows.items():
        built.add_row(name, value)
    return built


def receipt_table(receipt: Receipt, tokens: Sequence[str] | None = None) -> Table:
    """Build a table of a write receipt: the loss by step, and the lost positions or, if given, tokens."""
    built = Table(title="write receipt", show_header=False)
    if receipt.fidelity is not None:
        built.add_row("answers", fidelity_line(receipt.fidelity))
    built.add_row("write loss by step", _by_step(receipt.losses))
    if receipt.answers != []:
        built.add_row("answers at risk", _at_risk([receipt]))
    if not receipt.measured:
        built.add_row("tokens kept", f"{NOT_MEASURED} since more was written")
        return built
    kept = receipt.context_tokens - len(receipt.lost)
    built.add_row("tokens kept", f"{kept} of {receipt.context_tokens} (loss below ln 2 = 0.693)")
    if tokens is None:
        built.add_row("positions lost", _listed([str(position) for position in receipt.lost], ", ") or "none")
        return built
    text = Text(overflow="fold")  # fold, since the text may have no spaces
    lost_at = set(receipt.lost)
    for position, token in enumerate(tokens):
        text.append(token, style="bold white on red" if position in lost_at else "green")
    built.add_row("text (lost in red)", text)
    if lost_at:
        built.add_row("lost", _listed([f"{tokens[i]!r}@{i}" for i in receipt.lost], " "))
    return built


def fidelity_line(fidelity: dict[str, float]) -> str:
    """Say how close answers are to those of the model with the whole text."""
    same, unwritten = (f"{fidelity[name]:.1%}" for name in ("agreement", "agreement_unwritten"))
    return (
        f"{same} of {fidelity['tokens']:.0f} tokens as with the whole text, KL {fidelity['kl']:.3f} nats; without the "
        f"text {unwritten}, {fidelity['kl_unwritten']:.3f} nats ({fidelity['questions']:.0f} questions, none fitted)"
    )


NOT_MEASURED = "not measured"


def _at_risk(receipts: Sequence[Receipt]) -> str:
    """Return how many of the answers in the texts may be wrong."""
    answers = [receipt.answers for receipt in receipts]
    if any(one is None for one in answers):
        return NOT_MEASURED
    total = sum(len(one or ()) for one in answers)
    return f"{sum(len(receipt.at_risk or ()) for receipt in receipts)} of {total}" if total else "none known"


MAX_LISTED = 50
"""Most lost tokens that a table lists."""


def _listed(lost: Sequence[str], between: str) -> str:
    more = f"{between}and {len(lost) - MAX_LISTED:,} more" if len(lost) > MAX_LISTED else ""
    return between.join(lost[:MAX_LISTED]) + more


MAX_LOSSES = 10
"""Most losses that a table shows. Of more steps it shows a selection."""


def _by_step(losses: Sequence[float]) -> str:
    if len(losses) <= MAX_LOSSES:
        return "  ".join(f"{loss:.4f}" for loss in losses)
    last = len(losses) - 1
    return "  ".join(
        f"{losses[step]:.4f} @{step}" for step in (i * last // (MAX_LOSSES // 2) for i in range(MAX_LOSSES // 2 + 1))
    )


def receipts_table(receipts: Sequence[Receipt]) -> Table:
    """Build a table of the write receipts of several chunks, with their sums."""
    built = Table(title="write receipts", show_footer=True)
    kept = [receipt.context_tokens - len(receipt.lost) for receipt in receipts]
    tokens = [receipt.context_tokens for receipt in receipts]
    columns = {
        "chunk": ([str(i) for i in range(1, len(receipts) + 1)], "all"),
        "tokens": (tokens, str(sum(tokens))),
        "steps": ([receipt.steps for receipt in receipts], ""),
        "write loss before": ([f"{receipt.loss_before:.4f}" for receipt in receipts], ""),
        "after": ([f"{receipt.loss_after:.4f}" for receipt in receipts], ""),
        "tokens kept": (kept, str(sum(kept))),
        "answers at risk": ([_at_risk([receipt]) for receipt in receipts], _at_risk(receipts)),
    }
    measured = [receipt.fidelity for receipt in receipts]
    if any(measured):
        columns["KL"] = ([f"{one['kl']:.3f}" if one else "" for one in measured], "")
        columns["as with the whole text"] = ([f"{one['agreement']:.1%}" if one else "" for one in measured], "")
    for heading, (_, footer) in columns.items():
        built.add_column(heading, footer, justify="right")
    for cells in zip(*(cells for cells, _ in columns.values()), strict=True):
        built.add_row(*map(str, cells))
    return built


def restored_table(receipts: Sequence[Receipt], texts: Sequence[str]) -> Table:
    """Build a table of how certain a restored text is, from the receipts alone."""
    built = Table(title="restored", show_header=False)
    exact = [text_digest(text) == receipt.context_sha256 for receipt, text in zip(receipts, texts, strict=True)]
    tokens, lost = (sum(map(len, rows)) for rows in zip(*((r.token_losses, r.lost) for r in receipts), strict=True))
    built.add_row("exact, by SHA-256", "yes" if all(exact) else f"{sum(exact)} of {len(exact)} chunks")
    built.add_row("uncertain tokens", f"{lost} of {tokens} (loss above ln 2 = 0.693)")
    for number, (receipt, same) in enumerate(zip(receipts, exact, strict=True), 1):
        if not same:
            positions = ", ".join(map(str, receipt.lost)) or "none: the tokenizer may not keep all of this text"
            built.add_row(f"uncertain in chunk {number}", positions)
    return built


def differences_table(task: Task, ids: Sequence[Sequence[int]], originals: Sequence[str | None]) -> Table:
    """Build a table of where restored tokens differ from the original texts. Rows without a text are skipped."""
    built = Table(title="compared with the original", show_header=False)
    right = total = 0
    first: tuple[str, str] | None = None
    for number, (found, text) in enumerate(zip(ids, originals, strict=True), 1):
        if text is None:
            continue
        wanted = task.encode(task.context_text(text))
        same = [a == b for a, b in zip(found, wanted, strict=False)]
        right, total = right + sum(same), total + len(same)
        if not all(same) and first is None:
            at = same.index(False)
            piece = f"{task.pieces(task.context_text(text))[at]!r}, restored as {task.text([found[at]])!r}"
            first = f"first difference, chunk {number}, token {at}", piece
    built.add_row("tokens right", f"{right} of {total} ({right / total:.2%})")
    built.add_row(*(first or ("differences", "none")))
    return built


def tokens_of(memory: BoundMemory, text: str) -> list[str]:
    """Return the tokens of a text in the form that the model reads."""
    task = memory.model.task
    return task.pieces(task.context_text(text))
