"""GradMem on keys and values that start as entries of the context's own key-value cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backbone import Backbone
from ...batch import Tokens
from ...compaction.entries import Entries
from ...compaction.match import match, sizes_of
from ...compaction.text import Asked, References, Text, read_repeated, repeat_query, stock_questions
from ...inner.optimizers import Tensors
from ...memory import Memory
from ...ops.dtypes import wide
from ...prefix import Prefix
from .entries_method import EntriesMethod
from .gradmem_options import GradMemOptions
from .head_prefix import HeadPrefix
from .inner_loop import InnerLoop
from .options import keywords_of
from .write_objectives import OBJECTIVES, Given
from .written import Written

READ_CHUNKS = 4
"""Most chunks of a long document that a question reads."""


class StartedGradMem(InnerLoop, EntriesMethod):
    """GradMem whose memory starts as entries of the context's cache: K steps move their keys and values.

    The model reads the context once, and its queries while it repeats the context choose the entries. There are as many
    for each head, and questions begin right after them; or all heads share one budget, and questions begin after the
    end of the context. A step moves keys and values in units of their size, the root mean square of a head's, by inner
    learning rates that may be learned for each layer and head.

    The meta-gradient passes through the steps, the entries and the reading of the context. Which entries are kept is
    constant, and so is what the repetition looks for.

    For what a memory holds see `EntriesMethod`.

    Parameters
    ----------
    backbone : Backbone
    **options
        The fields of `GradMemOptions`.
    """

    compiles = False
    runtime_options = ("read_chunks",)

    @keywords_of(GradMemOptions)
    def __init__(self, backbone: Backbone, **options: Any) -> None:
        own = GradMemOptions(**options)
        super().__init__(backbone, "text" if own.shared else "memory", READ_CHUNKS)
        self.write_steps = own.write_steps
        heads = (self.layers, self.heads, 1, 1)
        self._prepare_descent(own, {"key": heads, "value": heads})
        self.questions = () if "answers" in own.objectives else None

    def trajectory(self, context: Tokens, steps: int, *, until: float | None = None) -> Iterator[Written]:
        """Yield the start, and the memory after every step; see `Method.trajectory`."""
        self._check_write(context, steps)
        lengths = context.values.lengths.tolist()
        with self.backbone.without_dropout():
            texts = [self.read_text(ids[:length].tolist()) for ids, length in zip(context.ids, lengths, strict=True)]
            starts, references = zip(*map(self.start_of, texts), strict=True)
        given = self._given(context, texts, starts, references)
        keys, values = given.start
        sizes = [sizes_of(tensor, given.used) for tensor in given.start]
        forward_context = self._forward_context()

        def moved(moves: Tensors, *start: Tensor) -> list[Tensor]:
            pairs = zip(("key", "value"), start[:2], start[2:], strict=True)
            return [tensor + moves[name] * size for name, tensor, size in pairs]

        def loss(moves: Tensors, *start: Tensor) -> Tensor:
            with forward_context(), self.backbone.without_dropout():
                now = moved(moves, *start)
                return torch.stack([OBJECTIVES[name](given, *now) for name in self.options.objectives]).sum(0)

        zero = {"key": torch.zeros_like(keys), "value": torch.zeros_like(values)}
        for step in self._states(loss, zero, steps, [keys, values, *sizes], until):
            losses = torch.stack(step.losses) if step.losses else keys.new_zeros(0, len(context))
            yield Written(_memory(starts, moved(step.tensors, keys, values, *sizes)), losses, step.taken)

    def read_text(self, ids: list[int]) -> Text:
        """Read a context whole, note what the model looks for when it repeats it, and let it answer questions."""
        text = read_repeated(self.backbone, self.task, ids)
        if "answers" not in self.options.objectives:
            return text
        with torch.no_grad():
            whole = self.entries_prefix(text.whole)
            pairs, _ = stock_questions(self.backbone, self.task, whole, self.questions or ())
            return replace(text, study=Asked.read(self.backbone, whole, *pairs))

    def start_of(self, text: Text) -> tuple[Entries, References]:
        """The entries that a memory starts with, and what questions right after them look for."""
        entries, references = self.kept(text, self.options.budget or self.options.n_mem, shared=self.options.shared)
        if self.options.start == "match":
            entries = match(entries, references, self.metric)
        return entries, references

    def without_text(self, rows: int) -> Memory:
        """Memories of no text; see `Method.without_text`."""
        return self.unwritten.select([0] * rows)

    def _given(
        self, context: Tokens, texts: list[Text], starts: tuple[Entries, ...], references: tuple[References, ...]
    ) -> Given:
        most = max(entries.keys.shape[2] for entries in starts)
        keys, values = (
            torch.stack([F.pad(wide(tensor), (0, 0, 0, most - tensor.shape[2])) for tensor in tensors])
            for tensors in ([entries.keys for entries in starts], [entries.values for entries in starts])
        )
        counts = torch.stack([entries.counts for entries in starts]).to(keys.device)
        used = torch.arange(most, device=keys.device) < counts[..., None]
        begins = torch.tensor([entries.start for entries in starts], device=keys.device)
        return Given(
            self.backbone,
            context,
            used,
            list(references),
            [text.study for text in texts],
            self.metric,
            partial(self.repeat_losses, query=repeat_query(self.task)),
            partial(self._prefix_of, used, begins),
            (keys, values),
        )

    def _prefix_of(self, used: Tensor, begins: Tensor, keys: Tensor, values: Tensor) -> Prefix:
        """Put entries (batch, layers, heads, entries, width) into a cache; heads do not see places without one."""
        model, cache = self.backbone.model, self.backbone.new_cache()
        for layer in range(self.layers):
            cache.update(keys[:, layer].to(model.dtype), values[:, layer].to(model.dtype), layer)
        last = torch.zeros(len(keys), self.backbone.width, dtype=model.dtype, device=keys.device)
        plain = Prefix(last, cache, start=begins)
        return plain if bool(used.all()) else HeadPrefix(plain, self.backbone, ~used)


def _memory(starts: tuple[Entries, ...], tensors: list[Tensor]) -> Memory:
    """The memory of each row, without pads."""
    rows = []
    for row, entries in enumerate(starts):
        keys, values = (tensor[row, :, :, : entries.keys.shape[2]] for tensor in tensors)
        rows.append(replace(entries, keys=keys, values=values, places=None).memory())
    return Memory.join(rows)
