"""Compact: the key-value cache of a text in a fraction of its entries, for any language model, without training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from ..backbone import Backbone
from ..batch import Tokens
from ..compaction.budget import entries_of
from ..compaction.chunks import PLAIN, attention_to_chunks, one_after_the_other, together
from ..compaction.entries import TENSORS, Entries
from ..compaction.fidelity import compared, fidelity
from ..compaction.heads import attention_layers, output_metric
from ..compaction.match import match
from ..compaction.select import Score, renumbered, select
from ..compaction.study import study
from ..compaction.text import Text, read_repeated, read_text, whole_prefix
from ..errors import GradmemError, require
from ..key_positions import KeyMover
from ..memory import LENGTHS, Memory
from ..prefix import Prefix
from .base import Written
from .base.head_prefix import HeadPrefix
from .base.options import Options, keywords_of
from .base.repeating import Repeating

WRITERS = ("select", "match", "study")
"""Writers, in the order in which they run."""
QUESTION_ROOM = 512
"""Positions for a question and its answer behind several chunks."""


@dataclass(frozen=True, kw_only=True)
class CompactOptions(Options):
    """Options of `compact`."""

    budget: float | str = 0.1
    """How much to keep of the key-value cache. Up to 1: this fraction of its entries. Above 1: this many entries for
    each head, on average. A text such as 200KB or 2MB: bytes of keys and values in float32."""
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


class Compact(Repeating):
    """The key-value cache of a text, compacted to a fraction of its entries: a memory that answers questions.

    The model reads the text once and answers questions that fit any text. Its own queries say which entries count, and
    what attention should find in them. Nothing is trained, and the questions that people will ask need not be known.

    A backbone with `lora` can be trained to answer from what `select` keeps. Gradients pass through the text's cache
    and the reading; what is kept is chosen by the queries that repeat the text, and is constant.

    A memory holds `keys` and `values`, shapes (batch, entries, width), of all heads one after the other: layer 0 head
    0, layer 0 head 1, and so on. `counts`, int64, shape (batch, layers, heads), says how many each head has, and
    `before` how many of these, its first ones, stand before the text; `start`, int64, shape (batch,), at which position
    a question begins; `lengths` how many entries a row has. A row is a chunk of a document, and a question reads the
    rows that it attends to most.

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
    reads_together = True
    runtime_options = ("read_chunks",)

    @keywords_of(CompactOptions)
    def __init__(self, backbone: Backbone, **options: Any) -> None:
        own = CompactOptions(**options)
        super().__init__(backbone.requires_grad_(backbone.has_lora))
        self.options, self.read_chunks = own, own.read_chunks
        self.positions = own.positions or ("text" if own.shared else "memory")
        self.mover = KeyMover(backbone) if self.positions == "memory" else None
        self.writers = own.writers.split(",")
        self.write_steps = len(self.writers)
        if not backbone.max_full_attention:
            kind, field = backbone.model.config.model_type, backbone.windows[0]
            raise GradmemError(
                f"compact needs full attention in every layer, and '{kind}' has {field}: switch it off in its "
                "config, or take another model"
            )
        self._attention = attention_layers(backbone)
        first = self._attention[0]
        self.layers, self.heads = len(self._attention), first.heads
        self.widths = {"keys": first.keys, "values": first.values}
        if self.positions == "text" and not backbone.takes_positions:
            raise GradmemError(
                f"'{backbone.model.config.model_type}' counts positions for itself: give `shared: false`, so that "
                "questions begin right after the memory"
            )

    @cached_property
    def metric(self) -> Tensor:
        """What a change of a head's output weighs; see `output_metric`."""
        return output_metric(self.backbone, self._attention)

    # WRITE

    @property
    def max_query(self) -> int:
        """Longest query and answer in tokens."""
        return self.backbone.max_full_attention - len(self.before_context)

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
            _, memory = next(self.compacted(text, self.options.budget))
            yield from [(memory, None)] * self.write_steps
            return
        text = self.read_text(ids)
        if not text.held_out.queries:
            yield from ((memory, None) for _, memory in self.compacted(text, self.options.budget))
            return
        unwritten = fidelity(self.backbone, self.prefix(self.unwritten), text.held_out)
        start = None
        for _, memory in self.compacted(text, self.options.budget):
            found = fidelity(self.backbone, self.prefix(memory), text.held_out)
            start = found if start is None else start
            yield memory, compared(unwritten, start, found, text.held_out)

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
        bytes_of_entry = self.layers * self.heads * sum(self.widths.values()) * 4
        count = entries_of(budget, text.whole.keys.shape[2], bytes_of_entry)
        entries, references = select(text, count, self.metric, self.options.score, self.options.shared), text.references
        entries = entries.after(len(self.before_context))
        if self.mover is not None:
            entries, references = renumbered(entries, references, self.mover)
        yield "select", entries.memory()
        if "match" in self.writers:
            entries = match(entries, references, self.metric)
            yield "match", entries.memory()
        if "study" in self.writers:
            entries = study(entries, text, self.backbone, self.task, self._entries_prefix)
            yield "study", entries.memory()

    @cached_property
    def unwritten(self) -> Memory:
        """The memory of no text."""
        if not self.before_context:
            return self._empty()
        with torch.no_grad(), self.backbone.without_dropout():
            prefix = whole_prefix(self.backbone, self.task, [])
        entries = Entries.of_prefix(prefix)
        return replace(entries, first=entries.counts).memory()

    def _empty(self) -> Memory:
        model = self.backbone.model
        none = {
            name: torch.zeros(1, 0, width, dtype=model.dtype, device=model.device)
            for name, width in self.widths.items()
        }
        counts, start = torch.zeros(1, self.layers, self.heads, dtype=torch.long), torch.zeros(1, dtype=torch.long)
        return Memory({**none, "counts": counts, "before": counts, "start": start, LENGTHS: torch.tensor([0])})

    # READ

    def prefix(self, memory: Memory) -> Prefix:
        """Put keys and values into a cache; nothing is run."""
        rows = [Entries.of(memory, row) for row in range(len(memory))]
        first, *others = [self._entries_prefix(row) for row in rows]
        return first.join(others) if others else first

    def _entries_prefix(self, entries: Entries) -> HeadPrefix:
        model, cache = self.backbone.model, self.backbone.new_cache()
        if entries.keys.shape[2]:
            for layer, (keys, values) in enumerate(zip(entries.keys, entries.values, strict=True)):
                cache.update(keys[None].to(model.dtype), values[None].to(model.dtype), layer)
        plain = Prefix(torch.zeros(1, self.backbone.width, dtype=model.dtype, device=model.device), cache)
        plain.start = torch.tensor([entries.start], device=model.device)
        return HeadPrefix(plain, self.backbone, ~entries.used[None].to(model.device))

    def choose(self, memory: Memory, query: list[int]) -> list[int]:
        """Choose the rows that a question attends to most, at most `read_chunks`, in the order of the document."""
        if len(memory) <= self.read_chunks:
            return list(range(len(memory)))
        chunks = (Entries.of(memory, row) for row in range(len(memory)))
        start, plain = int(memory.tensors["start"].max()), self.task.encode_query(PLAIN)
        drawn = attention_to_chunks(self.backbone, self.prefix(self.unwritten), chunks, start, query, plain)
        return sorted(drawn.topk(self.read_chunks).indices.tolist())

    def together(self, memory: Memory) -> Memory:
        """Put the entries of all rows into one row, so that a question reads them together.

        The texts stand one after the other, if the model can move keys and has positions for all. If not, each begins
        where every text begins.
        """
        rows, length = [Entries.of(memory, row) for row in range(len(memory))], len(self.before_context)
        end = length + sum(row.start - length for row in rows)
        if self._behind is not None and end + QUESTION_ROOM <= self.backbone.max_full_attention:
            rows = one_after_the_other(rows, self._behind, length)
        return together(rows).memory()

    @cached_property
    def _behind(self) -> KeyMover | None:
        """Moves a text behind another; None if positions are those of the memory, or keys do not show theirs."""
        if self.positions == "memory":
            return None
        try:
            mover = KeyMover(self.backbone)
        except GradmemError:
            return None
        return mover if mover.kind == "rotary" else None

    def check(self, memory: Memory, what: str) -> None:
        """Raise `GradmemError` unless the memory has the tensors and shapes that this method writes."""
        found = memory.tensors
        if set(found) == set(TENSORS) and all(found[n].is_floating_point() == (n in self.widths) for n in found):
            counts, lengths = found["counts"], found[LENGTHS]
            shaped = all(found[name].shape[2:] == (width,) for name, width in self.widths.items())
            fits = counts.shape[1:] == (self.layers, self.heads) and found["start"].ndim == lengths.ndim == 1
            before = found["before"]
            fits = fits and before.shape == counts.shape and bool(((before >= 0) & (before <= counts)).all())
            if shaped and fits and bool((counts >= 0).all()) and bool((counts.sum((1, 2)) == lengths).all()):
                most = found["keys"].shape[1] == found["values"].shape[1] == max(lengths.tolist(), default=0)
                if (
                    most
                    and bool((found["start"] >= 0).all())
                    and int(found["start"].max()) <= self.backbone.max_positions
                ):
                    return
        shapes = {name: tuple(tensor.shape[1:]) for name, tensor in found.items()}
        raise GradmemError(f"{what} holds {shapes}, which is no compacted cache of this model")
