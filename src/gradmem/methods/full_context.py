"""Full context: the key-value cache after the context is the memory."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backbone import Backbone
from ..batch import Batch, Tokens
from ..errors import GradmemError
from ..memory import Memory
from ..prefix import Prefix
from .base.one_pass import OnePassMethod


class FullContext(OnePassMethod):
    """Keys and values of every context token: nothing is compressed, so this is the upper bound.

    The memory holds `keys` and `values`, shapes (batch, length, layers, heads, head width), with rotary positions
    applied, and on the CPU `lengths`, the number of tokens of each row: those that the task puts before every context
    (`Task.before_context`) and those of the context itself. It has no options.

    Parameters
    ----------
    backbone : Backbone
        With full attention in every layer, or with sliding windows: then a context and a query together are at most
        as long as the window, which therefore hides nothing.

    Raises
    ------
    GradmemError
        If the backbone restricts attention in another way, or its layers differ in shape.
    """

    task_name = "document"

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        kind = backbone.model.config.model_type
        if backbone.max_full_attention < 2:
            raise GradmemError(
                f"full_context needs layers that attend to all earlier tokens, and '{kind}' restricts them by "
                f"{' and '.join(backbone.windows)}: take another backbone"
            )
        try:
            with torch.no_grad(), backbone.without_dropout():
                keys, values = self._run(backbone.model.get_input_embeddings().weight[:1, None])
        except (RuntimeError, TypeError) as error:
            raise GradmemError(f"full_context needs layers with keys and values of one shape: {error}") from error
        self.shapes = {"keys": keys.shape[2:], "values": values.shape[2:]}

    @property
    def max_context(self) -> int:
        """Longest context in tokens: half of what attention reaches, so that it can be reconstructed after itself."""
        return self.backbone.max_full_attention // 2 - len(self.before_context)

    def prefix(self, memory: Memory) -> Prefix:
        """Put keys and values into a cache; nothing is run."""
        tensors, dtype = memory.tensors, self.backbone.model.dtype
        # (batch, length, layers, heads, width) -> for each layer (batch, heads, length, width)
        keys, values = (tensors[name].to(dtype).permute(2, 0, 3, 1, 4) for name in ("keys", "values"))
        cache, length = self.backbone.new_cache(), keys.shape[3]
        if length:
            for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
                cache.update(key, value, layer)
        last, lengths = keys.new_zeros(len(memory), self.backbone.width), tensors["lengths"].cpu()
        if bool((lengths == length).all()):
            return Prefix(last, cache)
        mask = _real(lengths, length).to(keys.device, non_blocking=True)
        return Prefix(last, cache, mask, lengths.to(keys.device, non_blocking=True))

    def read_targets(self, memory: Memory, batch: Batch) -> Tensor:
        """Compute the logits of the target tokens, with all queries of a context in one row; see `Method.read_targets`.

        No query sees another. The cache is not copied for each query, which would take most of the time of training.
        """
        queries, rows = batch.queries, batch.rows
        together = self.backbone.takes_positions and self.backbone.batches_uneven and self.backbone.takes_masks
        if not (together and len(rows)):
            return super().read_targets(memory, batch)
        prefix = self.prefix(memory)
        place = (rows[:, None] == rows).tril(-1).sum(1)  # of each query among those of its context
        most, length = batch.most, queries.ids.shape[1]
        packed = queries.ids.new_zeros(len(memory), most, length)
        packed[rows, place] = queries.ids
        embeds = self.backbone.embed(packed.flatten(1))
        start = memory.tensors["lengths"].to(rows.device, non_blocking=True)[:, None]
        start = start + torch.arange(length, device=rows.device).repeat(most)
        hidden = self.backbone.hidden(embeds, prefix.cache, _block_mask(prefix, most, length, embeds.dtype), start)
        mine = torch.cat([prefix.last[rows, None], hidden.unflatten(1, (most, length))[rows, place]], dim=1)
        return self.backbone.head(mine[:, :-1].flatten(0, 1)[batch.targets])

    def check(self, memory: Memory, what: str) -> None:
        """Raise `GradmemError` unless the memory has the tensors and shapes that this method writes."""
        found = memory.tensors
        if _forms(memory) == _forms(self._empty(1)):
            lengths, length = found["lengths"], found["keys"].shape[1]
            good = bool(((lengths >= 0) & (lengths <= length)).all())
            if good and found["values"].shape[1] == length <= self.backbone.max_positions // 2:
                return
        shapes = {name: tuple(tensor.shape[1:]) for name, tensor in found.items()}
        raise GradmemError(f"{what} holds {shapes}, which is no key-value cache of this backbone")

    def _unwritten(self, batch: int) -> Memory:
        """The memory of no text: what stands before every context."""
        if not self.before_context:
            return self._empty(batch)
        return self._of(torch.tensor([self.before_context] * batch, device=self.device), torch.zeros(batch).long())

    def _empty(self, batch: int) -> Memory:
        model = self.backbone.model
        none = torch.zeros(batch, dtype=torch.long)
        empty = {
            name: torch.zeros(batch, 0, *shape, dtype=model.dtype, device=model.device)
            for name, shape in self.shapes.items()
        }
        return Memory({**empty, "lengths": none})

    def _written(self, context: Tokens) -> Memory:
        before = torch.tensor(self.before_context, dtype=torch.long, device=context.ids.device)
        ids = torch.cat([before.expand(len(context), -1), context.ids], dim=1)
        return self._of(ids, context.values.lengths.cpu())

    def _of(self, ids: Tensor, lengths: Tensor) -> Memory:
        """The memory of tokens (batch, length): what stands before every context, and `lengths` tokens after it."""
        keys, values = self._run(self.backbone.embed(ids))
        lengths = lengths + len(self.before_context)
        pads = ~_real(lengths, keys.shape[1]).to(keys.device, non_blocking=True)[:, :, None, None, None]
        tensors = {"keys": keys.masked_fill(pads, 0), "values": values.masked_fill(pads, 0)}
        return Memory({**tensors, "lengths": lengths})

    def _run(self, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Run all tokens: keys and values, each of shape (batch, length, layers, heads, head width)."""
        cache = self.backbone.prefix(embeds).cache
        keys, values = (
            torch.stack([getattr(layer, name) for layer in cache.layers]).permute(1, 3, 0, 2, 4)
            for name in ("keys", "values")
        )
        return keys, values


def _forms(memory: Memory) -> dict[str, tuple[bool, int, torch.Size]]:
    """Describe what all memories of a backbone have in common."""
    return {name: (t.is_floating_point(), t.ndim, t.shape[2:]) for name, t in memory.tensors.items()}


def _block_mask(prefix: Prefix, queries: int, length: int, dtype: torch.dtype) -> Tensor:
    """Build an additive mask by which each query sees the prefix and itself: (batch, 1, queries, prefix + queries)."""
    before = prefix.seen
    causal = torch.ones(length, length, dtype=torch.bool, device=before.device).tril()
    own = torch.block_diag(*[causal] * queries).expand(len(before), -1, -1)
    seen = torch.cat([before[:, None].expand(-1, own.shape[1], -1), own], dim=2)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def _real(lengths: Tensor, length: int) -> Tensor:
    """Mark the first `lengths` positions of each row: bool, shape (batch, length)."""
    return torch.arange(length, device=lengths.device) < lengths[:, None]
