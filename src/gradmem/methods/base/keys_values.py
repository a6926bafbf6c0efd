"""A memory of keys and values: slots in the cache of every layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ...backbone import Backbone
from ...inner.optimizers import Tensors
from ...prefix import Prefix
from .form import Form, identity

STD = 0.02
"""Standard deviation of the slots before training, as published."""


class KeysValues(Form):
    """In every layer m slots, each with a key and a value for every key-value head, as if m tokens stood before.

    Every token attends to all slots. Slots have no hidden states: nothing in them changes from layer to layer. Tokens
    have the positions m, m + 1, ...; keys are kept as attention compares them, after any rotation.

    The tensors are `keys_L` and `values_L` of every layer L, shape (batch, key-value heads, m, width).

    Parameters
    ----------
    backbone : Backbone
    slots : int
        Number of slots, m.
    begin : bool
        As for `Form`.
    project : bool
        Whether keys and values pass a learned linear map of their own in each layer, which starts as the identity.
    """

    def __init__(self, backbone: Backbone, slots: int, begin: bool, project: bool) -> None:
        super().__init__(backbone, begin)
        self.slots = slots
        like = backbone.model.get_input_embeddings().weight
        for number, layer in enumerate(_run_one_token(backbone).layers):
            for kind, (_, heads, _, width) in (("keys", layer.keys.shape), ("values", layer.values.shape)):
                slot = STD * torch.randn(heads, slots, width, dtype=like.dtype, device=like.device)
                self.initial[f"{kind}_{number}"] = nn.Parameter(slot)
        self.proj = nn.ModuleDict()
        for name, tensor in self.initial.items() if project else ():
            self.proj[name] = identity(tensor.shape[-1], like)

    def rate_shapes(self) -> dict[str, tuple[int, ...]]:
        """One rate for each head of each tensor."""
        return {name: (len(tensor), 1, 1) for name, tensor in self.initial.items()}

    def run(self, backbone: Backbone, tensors: Tensors, embeds: Tensor) -> Tensor:
        """Run embeddings after the slots; see `Form.run`."""
        return backbone.hidden(embeds, self._cache(backbone, tensors))

    def prefix(self, backbone: Backbone, tensors: Tensors, counts: Tensor | None = None) -> Prefix:
        """Put the slots into a cache; see `Form.prefix`. Those of several memories stand one after the other."""
        if counts is None:
            return self._prefix(backbone, tensors)
        parts, order = [], []
        for count in counts.unique().tolist():
            rows = (counts == count).nonzero()[:, 0]
            index = (counts.cumsum(0) - counts)[rows, None] + torch.arange(count)
            own = {name: tensor[index.to(tensor.device)] for name, tensor in tensors.items()}
            parts.append(self._prefix(backbone, {n: t.transpose(1, 2).flatten(2, 3) for n, t in own.items()}))
            order.append(rows)
        joined = parts[0].join(parts[1:]) if parts[1:] else parts[0]
        return joined.select(torch.cat(order).argsort().to(joined.last.device))

    def _prefix(self, backbone: Backbone, tensors: Tensors) -> Prefix:
        """Build a prefix whose rows have the same number of slots."""
        cache = self._cache(backbone, tensors)
        batch = len(next(iter(tensors.values())))
        if self.begin is None:
            like = next(iter(self.initial.values()))
            return Prefix(like.new_zeros(batch, backbone.width), cache)
        return Prefix(backbone.hidden(self._begins(batch), cache)[:, -1], cache)

    def _cache(self, backbone: Backbone, tensors: Tensors) -> Cache:
        cache = backbone.new_cache()
        for layer in range(len(self.initial) // 2):
            cache.update(*(self._projected(tensors, f"{kind}_{layer}") for kind in ("keys", "values")), layer)
        return cache

    def _projected(self, tensors: Tensors, name: str) -> Tensor:
        slots = self._own(tensors, name)
        projected: Tensor = self.proj[name](slots) if name in self.proj else slots
        return projected


def _run_one_token(backbone: Backbone) -> Cache:
    """Run one token, to see which keys and values each layer keeps."""
    cache = backbone.new_cache()
    with torch.no_grad(), backbone.without_dropout():
        backbone.hidden(backbone.embed(torch.zeros(1, 1, dtype=torch.long, device=backbone.model.device)), cache)
    return cache
