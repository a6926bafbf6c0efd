"""Compact: the key-value cache of a text in a fraction of its entries, for any language model, without training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..backbone import Backbone
from ..batch import Tokens
from ..compaction.budget import LEAST, enough, entries_of
from ..compaction.fidelity import compared, fidelity
from ..compaction.match import match
from ..compaction.select import Score
from ..compaction.study import study
from ..compaction.text import Text, read_repeated, read_text
from ..errors import GradmemError, require
from ..memory import Memory
from .base import Written
from .base.entries_method import EntriesMethod
from .base.options import Options, keywords_of

WRITERS = ("select", "match", "study")
"""Writers, in the order in which they run."""


@dataclass(frozen=True, kw_only=True)
class CompactOptions(Options):
    """Options of `compact`."""

    budget: float | str = 0.1
    """How much to keep of the key-value cache. Up to 1: this fraction of its entries, but of a short text at least 8
    for each head, on average. Above 1: this many entries for each head, on average. A text such as 200KB or 2MB: bytes
    of keys and values in float32."""
    writers: Literal["select", "select,match", "select,match,study"] = "select,match"
    """Writers, one after the other. select keeps entries as they are. match moves them until questions find in them
    what they find in the whole cache, without a pass through the model. study moves them by gradients through the
    model, on answers to questions about the text."""
    score: Score = "contribution"
    """How select ranks entries: by what they add to the output of their layer, by squared attention alone, by small
    norm of the key, or the last ones first."""
    shared: bool = True
    """Whether all heads of all layers share one budget. If not, every head keeps as many entries, and other programs
    can read the memory (`gradmem export`)."""
    positions: Literal["text", "memory"] | None = None
    """Where a question begins: after the end of the text, or right after the memory, whose keys move to positions 0 to
    m - 1. Default: text if heads share a budget, else memory."""
    read_chunks: int = 4
    """Most chunks of a long document that a question reads: those that it attends to most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        entries_of(self.budget, 2**40, 1)  # refuses what is no budget
        require("read_chunks", self.read_chunks, self.read_chunks >= 1, "at least 1")
        if self.shared and self.positions == "memory":
            raise GradmemError("`positions: memory` needs as many entries in every head: give `shared: false`")


class Compact(EntriesMethod):
    """The key-value cache of a text, compacted to a fraction of its entries: a memory that answers questions.

    The model reads the text once and answers questions that fit any text. Its own queries say which entries count, and
    what attention should find in them. Nothing is trained, and the questions that people will ask need not be known.

    A backbone with `lora` can be trained to answer from what `select` keeps. Gradients pass through the text's cache
    and the reading; what is kept is chosen by the queries that repeat the text, and is constant.

    For what a memory holds see `EntriesMethod`.

    Parameters
    ----------
    backbone : Backbone
    **options
        The fields of `CompactOptions`.

    Raises
    ------
    GradmemError
        If layers restrict attention to a window, keep no keys and values, or differ in shape.
    """

    write_steps = 2
    runtime_options = ("read_chunks",)

    @keywords_of(CompactOptions)
    def __init__(self, backbone: Backbone, **options: Any) -> None:
        own = CompactOptions(**options)
        positions = own.positions or ("text" if own.shared else "memory")
        super().__init__(backbone.requires_grad_(backbone.has_lora), positions, own.read_chunks)
        self.options = own
        self.writers = own.writers.split(",")
        self.write_steps = len(self.writers)

    # WRITE

    def trajectory(self, context: Tokens, steps: int, *, until: float | None = None) -> Iterator[Written]:
        """Yield the memory before the first writer and after each; see `Method.trajectory`.

        The memory before is that of no text: what the task puts before every text.
        """
        self._check_write(context, steps)
        self._refuse_until(until)
        lengths = context.values.lengths.tolist()
        rows = [self._write_row(row[:length].tolist()) for row, length in zip(context.ids, lengths, strict=True)]
        for taken in range(min(steps, self.write_steps) + 1):
            memories, measured = zip(*map(next, rows), strict=True)
            none = torch.zeros(0, len(rows))
            yield Written(Memory.join(memories), none, torch.full((len(rows),), taken), list(measured))

    def _write_row(self, ids: list[int]) -> Iterator[tuple[Memory, dict[str, float] | None]]:
        yield self.unwritten, None
        if torch.is_grad_enabled():
            text = read_repeated(self.backbone, self.task, ids)
            _, memory = next(self._written(text))
            yield from [(memory, None)] * self.write_steps
            return
        text = self.read_text(ids)
        if not text.held_out.queries:
            yield from ((memory, None) for _, memory in self._written(text))
            return
        unwritten = fidelity(self.backbone, self.prefix(self.unwritten), text.held_out)
        start = None
        for _, memory in self._written(text):
            found = fidelity(self.backbone, self.prefix(memory), text.held_out)
            start = found if start is None else start
            yield memory, compared(unwritten, start, found, text.held_out)

    def _written(self, text: Text) -> Iterator[tuple[str, Memory]]:
        """Run the writers with the budget of the options, which is raised for a short text."""
        return self.compacted(text, enough(self.options.budget, text.whole.keys.shape[2]))

    def notes(self, memory: Memory) -> list[str]:
        """Say if a short text was left more than the budget; see `Method.notes`."""
        budget, receipts = self.options.budget, memory.receipts
        length = len(self.before_context) + (receipts[0].context_tokens if receipts else 0)
        if enough(budget, length) == budget:
            return []
        return [
            f"so short a text keeps {min(LEAST, length)} of the {length} entries of each head, more than --budget "
            f"{budget:g}; fewer answer badly, but a number of entries (--budget 4) is taken as it is"
        ]

    def read_text(self, ids: list[int]) -> Text:
        """Read a text whole, with what questions look for in it: done once, for memories of any size."""
        with self.backbone.without_dropout():
            return read_text(self.backbone, self.task, ids, self.questions or ())

    def compacted(self, text: Text, budget: float | str) -> Iterator[tuple[str, Memory]]:
        """Run the writers one after the other.

        Parameters
        ----------
        text : Text
        budget : float or str
            As the option.

        Yields
        ------
        tuple of str and Memory
            Name of the writer, and the memory that it left.

        Raises
        ------
        GradmemError
            If the budget is less than one entry for each head.
        """
        entries, references = self.kept(text, budget, self.options.score, self.options.shared)
        yield "select", entries.memory()
        if "match" in self.writers:
            entries = match(entries, references, self.metric)
            yield "match", entries.memory()
        if "study" in self.writers:
            entries = study(entries, text, self.backbone, self.task, self.entries_prefix)
            yield "study", entries.memory()
