"""The attention heads of a model: their shapes, and what a change of one head's output does to its layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..backbone import Backbone
from ..errors import GradmemError
from ..ops.dtypes import wide
from ..ops.head_attention import head_attention
from ..probing import FAILURES


@dataclass(frozen=True)
class Layer:
    """The attention of one layer: its module, key-value heads, query heads for each, and widths of keys and values."""

    module: nn.Module
    heads: int
    each: int
    keys: int
    values: int

    @property
    def shape(self) -> tuple[int, ...]:
        """All numbers."""
        return self.heads, self.each, self.keys, self.values


def attention_layers(backbone: Backbone) -> list[Layer]:
    """Find the attention of every layer, by running the model on one vector.

    Raises
    ------
    GradmemError
        If a layer's attention cannot be observed, layers differ in shape, or queries are compared with something else
        than the keys in the cache.
    """
    kind = backbone.model.config.model_type
    found: dict[int, Layer] = {}
    good = True

    def observe(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> None:
        nonlocal good
        layer = Layer(module, key.shape[1], query.shape[1] // key.shape[1], key.shape[3], value.shape[3])
        found[int(module.layer_idx)] = layer  # type: ignore[arg-type]
        cached = cache.layers[int(module.layer_idx)]  # type: ignore[arg-type]
        good &= query.shape[3] == key.shape[3] and cached.keys.shape == key.shape and cached.values.shape == value.shape

    cache = backbone.new_cache()
    try:
        with torch.no_grad(), backbone.without_dropout(), head_attention(backbone.model, observer=observe):
            backbone.hidden(_probe(backbone), cache)
    except FAILURES as error:
        raise GradmemError(f"compact cannot observe the attention of '{kind}': {error}") from error
    if sorted(found) != list(range(len(cache.layers))):
        raise GradmemError(f"compact cannot observe the attention of '{kind}': take another model, or the method cram")
    layers = [found[layer] for layer in sorted(found)]
    if not good or len({layer.shape for layer in layers}) > 1:
        raise GradmemError(f"compact needs layers with keys and values of one shape, and those of '{kind}' differ")
    return layers


@torch.no_grad()
def output_metric(backbone: Backbone, layers: list[Layer]) -> Tensor:
    """For each query head, W W^T of its part W of the output projection: the squared length of a change x is x W W^T x.

    Parameters
    ----------
    backbone : Backbone
    layers : list of Layer

    Returns
    -------
    Tensor, shape (layers, key-value heads, query heads each, value width, value width)

    Raises
    ------
    GradmemError
        If attention is followed by no linear layer.
    """
    called: list[tuple[int, Any]] = []
    hooks = [
        child.register_forward_pre_hook(lambda child, _, number=number: called.append((number, child)))
        for number, layer in enumerate(layers)
        for child in layer.module.modules()
        if _maps(child) == (layer.heads * layer.each * layer.values, backbone.width)
    ]
    try:
        backbone.hidden(_probe(backbone))
    finally:
        for hook in hooks:
            hook.remove()
    last = dict(called)  # the output projection is the last that a layer's attention calls
    metrics = []
    for number, layer in enumerate(layers):
        if number not in last:
            kind = backbone.model.config.model_type
            raise GradmemError(f"compact needs a linear layer behind attention, and '{kind}' has none")
        weight = last[number].weight.detach()
        rows = weight if isinstance(last[number], Conv1D) else weight.T
        part = wide(rows).unflatten(0, (layer.heads, layer.each, layer.values))
        with torch.autocast(part.device.type, enabled=False):  # it is kept when training in bf16 is over
            metrics.append(torch.einsum("hrdo,hreo->hrde", part, part))
    return torch.stack(metrics)


def _probe(backbone: Backbone) -> Tensor:
    return backbone.embed(torch.zeros(1, 1, dtype=torch.long, device=backbone.model.device))


def _maps(module: nn.Module) -> tuple[int, int] | None:
    """From how many numbers to how many a linear layer maps; None for other modules."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return (module.nx, module.nf) if isinstance(module, Conv1D) else None
