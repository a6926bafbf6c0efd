"""LoRA on a whole language model: a small part of its weights is trained, and merged when the model is saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .errors import GradmemError

NAME = "backbone"
"""Name of the adapter."""


def add_low_rank(model: PreTrainedModel, rank: int) -> None:
    """Add LoRA (arXiv 2106.09685) to all linear layers of the blocks; nothing else is trained from now on.

    Parameters
    ----------
    model : PreTrainedModel
    rank : int

    Raises
    ------
    GradmemError
        If the rank is not positive, or peft is absent.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise GradmemError(f"the backbone's lora must be a rank of at least 1, not {rank!r}")
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise GradmemError("`lora` of a backbone needs peft: pip install 'gradmem[train]'") from error
    transposed = any(isinstance(module, Conv1D) for module in model.modules())
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM", fan_in_fan_out=transposed
    )
    inject_adapter_in_model(config, model, adapter_name=NAME)


def low_rank_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The weights that `add_low_rank` added; empty if there are none."""
    return [own for name, own in model.named_parameters() if name.endswith(f".{NAME}.weight") and "lora_" in name]


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Put plain layers with merged weights in the place of those with LoRA, until the context ends."""
    found: list[tuple[nn.Module, str, Any]] = [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in parent.named_children()
        if NAME in getattr(child, "lora_A", {})
    ]
    kept = [child.base_layer.weight.detach().clone() for *_, child in found]
    try:
        with torch.no_grad():
            for parent, name, child in found:
                child.base_layer.weight += child.get_delta_weight(NAME).to(child.base_layer.weight.dtype)
                setattr(parent, name, child.base_layer)
        yield
    finally:
        with torch.no_grad():
            for (parent, name, child), weight in zip(found, kept, strict=True):
                setattr(parent, name, child)
                child.base_layer.weight.copy_(weight)
