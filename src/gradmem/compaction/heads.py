"""What a change of one attention head's output does to the output of its layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..backbone import Backbone
from ..errors import GradmemError
from ..ops.head_attention import head_attention


@torch.no_grad()
def output_metric(backbone: Backbone) -> Tensor:
    """For each query head, W W^T of its part W of the output projection: the squared length of a change is x W W^T x.

    Parameters
    ----------
    backbone : Backbone

    Returns
    -------
    Tensor, shape (layers, key-value heads, query heads each, value width, value width)

    Raises
    ------
    GradmemError
        If the model's attention cannot be observed, or has no linear output projection.
    """
    modules: dict[int, Any] = {}
    shapes: dict[int, tuple[int, int, int]] = {}

    def observe(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> None:
        modules[int(module.layer_idx)] = module  # type: ignore[arg-type]
        shapes[int(module.layer_idx)] = (key.shape[1], query.shape[1] // key.shape[1], value.shape[3])  # type: ignore[arg-type]

    probe = backbone.embed(torch.zeros(1, 1, dtype=torch.long, device=backbone.model.device))
    with head_attention(backbone.model, observer=observe):
        backbone.hidden(probe)
    called: list[tuple[int, nn.Module]] = []
    hooks = [
        child.register_forward_pre_hook(lambda child, _, layer=layer: called.append((layer, child)))
        for layer, module in modules.items()
        for child in module.modules()
        if isinstance(child, nn.Linear | Conv1D)
    ]
    try:
        backbone.hidden(probe)
    finally:
        for hook in hooks:
            hook.remove()
    last = dict(called)  # the output projection is the last that a layer's attention calls
    metrics = []
    for layer in sorted(modules):
        heads, each, width = shapes[layer]
        weight = last[layer].weight if layer in last else None
        if not isinstance(weight, Tensor) or heads * each * width not in weight.shape:
            raise GradmemError(f"'{backbone.model.config.model_type}' has no linear output after its attention")
        rows = weight if isinstance(last[layer], Conv1D) else weight.T
        part = rows.float().unflatten(0, (heads, each, width))
        metrics.append(torch.einsum("hrdo,hreo->hrde", part, part))
    if not metrics:
        raise GradmemError(f"the attention of '{backbone.model.config.model_type}' cannot be observed")
    return torch.stack(metrics)
