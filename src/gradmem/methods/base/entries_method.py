"""Base of methods whose memory is entries of a text's own key-value cache."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from ...backbone import Backbone
from ...compaction.budget import entries_of
from ...compaction.chunks import PLAIN, attention_to_chunks, one_after_the_other, together
from ...compaction.entries import TENSORS, Entries
from ...compaction.heads import attention_layers, output_metric
from ...compaction.select import Score, renumbered, select
from ...compaction.text import References, Text, whole_prefix
from ...errors import GradmemError
from ...key_positions import KeyMover
from ...memory import LENGTHS, Memory
from ...prefix import Prefix
from .head_prefix import HeadPrefix
from .repeating import Repeating

QUESTION_ROOM = 512
"""Positions for a question and its answer behind several chunks."""


class EntriesMethod(Repeating):
    """Base of methods that keep entries of the key-value cache of a text, as they are or moved.

    A memory holds `keys` and `values`, shapes (batch, entries, width), of all heads one after the other: layer 0 head
    0, layer 0 head 1, and so on. `counts`, int64, shape (batch, layers, heads), says how many each head has, and
    `before` how many of these, its first ones, stand before the text; `start`, int64, shape (batch,), at which position
    a question begins; `lengths` how many entries a row has. A row is a chunk of a document, and a question reads the
    rows that it attends to most.

    Parameters
    ----------
    backbone : Backbone
    positions : {"text", "memory"}
        Where a question begins: after the end of the text, or right after the memory, whose keys move to positions 0 to
        m - 1.
    read_chunks : int
        Most chunks of a long document that a question reads.

    Raises
    ------
    GradmemError
        If layers restrict attention to a window, keep no keys and values, or differ in shape.
    """

    reads_together = True

    def __init__(self, backbone: Backbone, positions: Literal["text", "memory"], read_chunks: int) -> None:
        super().__init__(backbone)
        self.positions, self.read_chunks = positions, read_chunks
        self.mover = KeyMover(backbone) if positions == "memory" else None
        if not backbone.max_full_attention:
            kind, field = backbone.model.config.model_type, backbone.windows[0]
            raise GradmemError(
                f"a memory of cache entries needs full attention in every layer, and '{kind}' has {field}: switch it "
                "off in its config, or take another model"
            )
        self._attention = attention_layers(backbone)
        first = self._attention[0]
        self.layers, self.heads = len(self._attention), first.heads
        self.widths = {"keys": first.keys, "values": first.values}
        if positions == "text" and not backbone.takes_positions:
            raise GradmemError(
                f"'{backbone.model.config.model_type}' counts positions for itself: give `shared: false`, so that "
                "questions begin right after the memory"
            )

    @cached_property
    def metric(self) -> Tensor:
        """What a change of a head's output weighs; see `output_metric`."""
        return output_metric(self.backbone, self._attention)

    @property
    def max_query(self) -> int:
        """Longest query and answer in tokens."""
        return self.backbone.max_full_attention - len(self.before_context)

    # WRITE

    def kept(
        self, text: Text, budget: float | str, score: Score = "contribution", shared: bool = False
    ) -> tuple[Entries, References]:
        """Keep entries of a text as they are.

        Parameters
        ----------
        text : Text
        budget : float or str
            See `gradmem.compaction.budget.entries_of`.
        score, shared
            As for `gradmem.compaction.select.select`.

        Returns
        -------
        Entries
        References
            The text's, with their queries at the positions at which questions stand.

        Raises
        ------
        GradmemError
            If the budget is less than one entry for each head.
        """
        bytes_of_entry = self.layers * self.heads * sum(self.widths.values()) * 4
        count = entries_of(budget, text.whole.keys.shape[2], bytes_of_entry)
        entries = select(text, count, self.metric, score, shared).after(len(self.before_context))
        return (entries, text.references) if self.mover is None else renumbered(entries, text.references, self.mover)

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
        first, *others = [self.entries_prefix(row) for row in rows]
        return first.join(others) if others else first

    def entries_prefix(self, entries: Entries) -> HeadPrefix:
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
