"""Vectors: input embeddings in the place of a text, from which a frozen language model answers questions about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backbone import Backbone
from ..batch import Tokens
from ..compaction.fidelity import compared, fidelity
from ..compaction.study import Pace, descend, questions_about
from ..compaction.text import Asked, stock_questions, whole_prefix
from ..memory import Memory
from ..prefix import Prefix
from .base import Written
from .base.options import keywords_of
from .base.prefix_method import PrefixOptions
from .base.repeating import Repeating
from .base.written import compare_forms

RATE, EVERY = 0.5, 10
"""Rate of Adam relative to the size of the start, and steps between two checks by questions that are not studied."""


@dataclass(frozen=True, kw_only=True)
class VectorsOptions(PrefixOptions):
    """Options of `vectors`."""

    n_mem: int = 32
    """Number of memory vectors, m."""
    write_steps: int = 60
    """Default number of write steps."""


class Vectors(Repeating):
    """Memory vectors that gradient steps fit to answers about a text, in the place of the text.

    They start as the embeddings of evenly spaced tokens of the text. Each step reads a few questions and descends the
    KL divergence to the model with the whole text along its own answers; see `gradmem.compaction.study`. Questions that
    are not studied decide which step's vectors are kept. Nothing of the model is trained.

    A memory holds `memory`, shape (batch, m, d).

    Parameters
    ----------
    backbone : Backbone
    **options
        The fields of `VectorsOptions`.
    """

    @keywords_of(VectorsOptions)
    def __init__(self, backbone: Backbone, **options: Any) -> None:
        own = VectorsOptions(**options)
        super().__init__(backbone.requires_grad_(False))
        self.options, self.write_steps = own, own.write_steps

    @property
    def n_mem(self) -> int:
        """Number of memory vectors."""
        return self.options.n_mem

    @property
    def max_query(self) -> int:
        """Longest query and answer in tokens."""
        return self.backbone.max_positions - len(self.before_context) - self.n_mem

    def trajectory(self, context: Tokens, steps: int, *, until: float | None = None) -> Iterator[Written]:
        """Yield the memory before the first step, and the best one so far after every step; see `Method.trajectory`.

        The memory before is that of no text: the mean of all token embeddings.
        """
        self._check_write(context, steps)
        self._refuse_until(until)
        lengths = context.values.lengths.tolist()
        rows = [self._write_row(row[:length].tolist(), steps) for row, length in zip(context.ids, lengths, strict=True)]
        for taken in range(steps + 1):
            memories, measured = zip(*map(next, rows), strict=True)
            none = torch.zeros(0, len(rows))
            yield Written(Memory.join(memories), none, torch.full((len(rows),), taken), list(measured))

    def _write_row(self, ids: list[int], steps: int) -> Iterator[tuple[Memory, dict[str, float] | None]]:
        """The memory of one text before the first step and after every step, with its fidelity."""
        backbone, task = self.backbone, self.task
        mean = backbone.model.get_input_embeddings().weight.detach().mean(0)
        yield Memory({"memory": mean.expand(1, self.n_mem, -1)}), None
        with torch.no_grad(), backbone.without_dropout():
            spaced = torch.linspace(0, len(ids) - 1, self.n_mem).round().long()
            start = backbone.embed(torch.tensor([ids], device=self.device)[:, spaced])
            whole = whole_prefix(backbone, task, ids)
            stock = stock_questions(backbone, task, whole, self.questions or ())
            study, held_out = (Asked.read(backbone, whole, *pairs) for pairs in stock)
            asked = Asked.join([study, questions_about(ids, backbone, task, whole)])
            unwritten = fidelity(backbone, whole_prefix(backbone, task, []), held_out) if held_out.queries else None

        def measured(found: tuple[float, float]) -> dict[str, float] | None:
            return None if unwritten is None else compared(unwritten, first, found, held_out)

        def prefix_of(tensors: list[Tensor]) -> Prefix:
            return self.prefix(Memory({"memory": tensors[0]}))

        best, first = [start], fidelity(backbone, prefix_of([start]), held_out) if held_out.queries else (0.0, 0.0)
        told = measured(first)
        size = start.float().square().mean().sqrt()
        for better in descend([start], [size], prefix_of, asked, backbone, Pace(steps, RATE, EVERY)):
            if better is not best:
                best, told = better, measured(fidelity(backbone, prefix_of(better), held_out))
            yield Memory({"memory": best[0]}), told

    def inputs(self, memory: Memory) -> tuple[Tensor, Tensor]:
        """Build what READ runs before a query: what the task puts before every text, and the vectors.

        Returns
        -------
        embeds : Tensor, shape (batch, positions, d)
        real : Tensor, bool, shape (batch, positions)
            All true, on the CPU.
        """
        vectors = memory.tensors["memory"].to(self.backbone.model.dtype)
        before = torch.tensor(self.before_context, dtype=torch.long, device=vectors.device)
        embeds = torch.cat([self.backbone.embed(before.expand(len(vectors), -1)), vectors], 1)
        return embeds, torch.ones(embeds.shape[:2], dtype=torch.bool)

    def prefix(self, memory: Memory) -> Prefix:
        """Run the `inputs` once for each row."""
        return self.backbone.prefix(*self.inputs(memory))

    def check(self, memory: Memory, what: str) -> None:
        """Raise `GradmemError` unless the memory has the tensors and shapes that this method writes."""
        compare_forms(memory, Memory({"memory": torch.zeros(1, self.n_mem, self.backbone.width)}), what)
