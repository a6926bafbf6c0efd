"""LoRA on a whole language model: a small part of its weights is trained, and merged when the model is saved."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .errors import GradmemError

NAME = "backbone"
"""Name of the adapter."""


def add_lora(model: PreTrainedModel, rank: int) -> None:
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
    inject(model, rank, NAME)


def inject(model: nn.Module, rank: int, name: str) -> None:
    """Inject LoRA adapters of a name into all linear layers of the blocks; other adapters stay.

    Raises
    ------
    GradmemError
        If peft is absent.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise GradmemError("LoRA needs peft: pip install 'gradmem[train]'") from error
    transposed = any(isinstance(module, Conv1D) for module in model.modules())
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM", fan_in_fan_out=transposed
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several sets of adapters are meant
        inject_adapter_in_model(config, model, adapter_name=name)


def adapted_layers(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """The layers with LoRA, each with the module that holds it and its name there."""
    return [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in list(parent.named_children())
        if hasattr(child, "lora_A")
    ]


@torch.no_grad()
def merge(parent: nn.Module, name: str, layer: Any, adapters: Iterable[str]) -> None:
    """Put a plain layer, whose weights have these adapters merged, in the place of one with LoRA."""
    for adapter in adapters:
        layer.base_layer.weight += layer.get_delta_weight(adapter).to(layer.base_layer.weight.dtype)
    setattr(parent, name, layer.base_layer)


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The weights that `add_lora` added; empty if there are none."""
    return [own for name, own in model.named_parameters() if name.endswith(f".{NAME}.weight") and "lora_" in name]


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Put plain layers with merged weights in the place of those with LoRA, until the context ends."""
    found = [one for one in adapted_layers(model) if NAME in one[2].lora_A]
    kept = [layer.base_layer.weight.detach().clone() for *_, layer in found]
    try:
        for one in found:
            merge(*one, [NAME])
        yield
    finally:
        with torch.no_grad():
            for (parent, name, layer), weight in zip(found, kept, strict=True):
                setattr(parent, name, layer)
                layer.base_layer.weight.copy_(weight)
