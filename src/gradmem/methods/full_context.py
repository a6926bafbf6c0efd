"""Full context: the key-value cache after the context is the memory, whole or cut to a budget."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..backbone import Backbone
from ..batch import Batch, Tokens
from ..errors import GradmemError, require
from ..memory import Memory
from ..ops.dtypes import work_dtype
from ..prefix import Prefix
from .base.one_pass import OnePassMethod


class FullContext(OnePassMethod):
    """Keys and values of every context token: the upper bound, and with a budget the simplest compressors.

    The memory holds `keys` and `values`, shapes (batch, entries, layers, heads, head width), with rotary positions
    applied; and on the CPU `lengths`, the entries of each row; and `start`, the position at which its queries begin,
    which is the length of its context whatever the budget.

    Parameters
    ----------
    backbone : Backbone
        With full attention in every layer.
    budget : int, optional
        Most entries to keep, for each layer and head; by default all.
    keep : {"last", "lowest-key-norm"}
        Entries to keep: those of the last tokens, or those with the smallest L2 norms of their keys, which attention
        tends to look at (arXiv 2406.11430; here in all layers); of norms that agree to 0.1 % the earliest.

    Raises
    ------
    GradmemError
        When a layer of the backbone does not attend to all that came before, an option is out of range, or positions
        cannot be given to a backbone that is to skip some.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        budget: int | None = None,
        keep: Literal["last", "lowest-key-norm"] = "last",
    ) -> None:
        super().__init__(backbone)
        require("budget", budget, budget is None or budget >= 1, "at least 1, or none to keep all")
        require("keep", keep, keep in ("last", "lowest-key-norm"), "last or lowest-key-norm")
        kind = backbone.model.config.model_type
        if backbone.windows:
            raise GradmemError(
                f"full_context needs full attention in every layer, and '{kind}' has {backbone.windows[0]}: switch it "
                "off in its config (often `sliding_window: null`) or take another backbone"
            )
        if budget and not (backbone.takes_positions and backbone.batches_uneven):
            raise GradmemError(
                f"'{kind}' counts its own positions, also of entries that were dropped: leave out `budget`"
            )
        self.budget, self.keep = budget, keep
        try:
            with torch.no_grad(), backbone.without_dropout():
                keys, values = self._run(backbone.model.get_input_embeddings().weight[:1, None])
        except (RuntimeError, TypeError) as error:
            raise GradmemError(f"full_context needs layers with keys and values of one shape: {error}") from error
        self.shapes = {"keys": keys.shape[2:], "values": values.shape[2:]}

    @property
    def max_context(self) -> int:
        """Longest context in tokens: half of the backbone's positions, so that it can be read back after itself."""
        return self.backbone.max_positions // 2

    def prefix(self, memory: Memory) -> Prefix:
        """Put the entries into a cache; nothing is run."""
        tensors, dtype = memory.tensors, self.backbone.model.dtype
        # (batch, entries, layers, heads, width) -> for each layer (batch, heads, entries, width)
        keys, values = (tensors[name].to(dtype).permute(2, 0, 3, 1, 4) for name in ("keys", "values"))
        cache, entries = self.backbone.new_cache(), keys.shape[3]
        if entries:
            for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
                cache.update(key, value, layer)
        lengths, start = tensors["lengths"].cpu(), tensors["start"].cpu()
        mask = None if bool((lengths == entries).all()) else _real(lengths, entries).to(keys.device, non_blocking=True)
        counted = bool((start == entries).all())
        last = keys.new_zeros(len(memory), self.backbone.width)
        return Prefix(last, cache, mask, None if counted else start.to(keys.device, non_blocking=True))

    def read_targets(self, memory: Memory, batch: Batch) -> Tensor:
        """As every method, but all queries of a context stand in one row, where none sees another.

        So the cache is not copied for each of them, which took most of the time of training.
        """
        queries, rows = batch.queries, batch.rows
        together = self.backbone.takes_positions and self.backbone.batches_uneven and self.backbone.takes_masks
        if not (together and len(rows)):
            return super().read_targets(memory, batch)
        prefix = self.prefix(memory)
        place = (rows[:, None] == rows).tril(-1).sum(1)  # of a query among those of its context
        most, length = batch.most, queries.ids.shape[1]
        packed = queries.ids.new_zeros(len(memory), most, length)
        packed[rows, place] = queries.ids
        embeds = self.backbone.embed(packed.flatten(1))
        start = memory.tensors["start"].to(rows.device, non_blocking=True)[:, None]
        start = start + torch.arange(length, device=rows.device).repeat(most)
        hidden = self.backbone.hidden(embeds, prefix.cache, _block_mask(prefix, most, length, embeds.dtype), start)
        mine = torch.cat([prefix.last[rows, None], hidden.unflatten(1, (most, length))[rows, place]], dim=1)
        return self.backbone.head(mine[:, :-1].flatten(0, 1)[batch.targets])

    def check(self, memory: Memory, what: str) -> None:
        """Raise `GradmemError` unless the memory has the tensors and shapes that this method writes."""
        found = memory.tensors
        if _forms(memory) == _forms(self._unwritten(1)):
            lengths, start, entries = found["lengths"], found["start"], found["keys"].shape[1]
            good = (lengths >= 0) & (lengths <= entries) & (lengths <= start) & (start <= self.max_context)
            if good.all() and found["values"].shape[1] == entries <= (self.budget or self.max_context):
                return
        shapes = {name: tuple(tensor.shape[1:]) for name, tensor in found.items()}
        raise GradmemError(f"{what} holds {shapes}, which is no key-value cache of this method's backbone and budget")

    def _unwritten(self, batch: int) -> Memory:
        model = self.backbone.model
        none = torch.zeros(batch, dtype=torch.long)
        empty = {
            name: torch.zeros(batch, 0, *shape, dtype=model.dtype, device=model.device)
            for name, shape in self.shapes.items()
        }
        return Memory({**empty, "lengths": none, "start": none})

    def _written(self, context: Tokens) -> Memory:
        keys, values = self._run(self.backbone.embed(context.ids))
        start = lengths = context.values.lengths.cpu()
        if self.budget is not None and self.budget < context.ids.shape[1]:
            index = self._choose(keys.detach(), context.mask)[..., None]
            keys, values = (tensor.take_along_dim(index, dim=1) for tensor in (keys, values))
            lengths = lengths.clamp_max(self.budget)
        pads = ~_real(lengths, keys.shape[1]).to(keys.device, non_blocking=True)[:, :, None, None, None]
        tensors = {"keys": keys.masked_fill(pads, 0), "values": values.masked_fill(pads, 0)}
        return Memory({**tensors, "lengths": lengths, "start": start})

    def _choose(self, keys: Tensor, mask: Tensor) -> Tensor:
        """Positions of the entries to keep in order, pads last: int64, shape (batch, budget, layers, heads)."""
        assert self.budget is not None
        mask = mask[:, :, None, None]
        # In steps of 0.1 %: rotary positions keep norms, and rounding must not choose between equal tokens.
        scores = -(keys.to(work_dtype(keys)).norm(dim=-1).log() * 1000).round()
        if self.keep == "last":
            scores = mask.cumsum(1).to(scores.dtype).expand_as(scores)
        order = scores.masked_fill(~mask, -torch.inf).sort(dim=1, descending=True, stable=True).indices
        return order[:, : self.budget].sort(dim=1).values

    def _run(self, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens, each of shape (batch, length, layers, heads, head width)."""
        cache = self.backbone.prefix(embeds).cache
        keys, values = (
            torch.stack([getattr(layer, name) for layer in cache.layers]).permute(1, 3, 0, 2, 4)
            for name in ("keys", "values")
        )
        return keys, values


def _forms(memory: Memory) -> dict[str, tuple[bool, int, torch.Size]]:
    """What any two memories of one backbone have in common."""
    return {name: (t.is_floating_point(), t.ndim, t.shape[2:]) for name, t in memory.tensors.items()}


def _block_mask(prefix: Prefix, queries: int, length: int, dtype: torch.dtype) -> Tensor:
    """Mask to add, so that queries see the prefix and themselves: (batch, 1, query tokens, prefix and query tokens)."""
    before = prefix.seen
    causal = torch.ones(length, length, dtype=torch.bool, device=before.device).tril()
    own = torch.block_diag(*[causal] * queries).expand(len(before), -1, -1)
    seen = torch.cat([before[:, None].expand(-1, own.shape[1], -1), own], dim=2)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def _real(lengths: Tensor, entries: int) -> Tensor:
    """True at the first `lengths` of the entries of each row: bool, shape (batch, entries)."""
    return torch.arange(entries, device=lengths.device) < lengths[:, None]
