"""Optimisers of meta-recipe."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..methods.base import Method
from .recipe import Recipe


def build_optimizers(method: Method, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else that is trained."""
    matrices = [p for p in _block_matrices(method) if p.requires_grad] if recipe.optimizer == "muon" else []
    inner = [] if recipe.inner_adamw_lr is None else [p for p in method.inner_parameters() if p.requires_grad]
    chosen = {id(p) for p in [*matrices, *inner]}
    rest = [p for p in method.parameters() if p.requires_grad and id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(
            torch.optim.Muon(matrices, lr=recipe.muon_lr, momentum=0.95, weight_decay=recipe.weight_decay)
        )
    if rest or inner:
        beta1, beta2 = recipe.betas
        groups: list[dict[str, Any]] = [
            {"params": rest},
            {"params": inner, "lr": recipe.inner_adamw_lr, "weight_decay": 0.0},
        ]
        optimizers.append(
            torch.optim.AdamW(
                [group for group in groups if group["params"]],
                lr=recipe.adamw_lr,
                betas=(beta1, beta2),
                weight_decay=recipe.weight_decay,
                fused=method.backbone.model.device.type == "cuda" or None,
            )
        )
    return optimizers


def _block_matrices(method: Method) -> list[nn.Parameter]:
    """2-d weights of the backbone that are neither embeddings nor the output layer (nor adapters).

    Weights only: other tables, as the decay rates of Mamba, multiply no vector.
    """
    body = method.backbone.body
    outside = {id(method.backbone.head.weight)}
    outside |= {id(m.weight) for m in body.modules() if isinstance(m, nn.Embedding)}
    return [
        p
        for name, p in body.named_parameters()
        if name.endswith("weight") and p.dim() == 2 and id(p) not in outside and "lora_" not in name
    ]
