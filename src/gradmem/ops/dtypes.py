"""Data types in which closed forms compute, with and without autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


def product_dtype(tensor: Tensor) -> torch.dtype:
    """Return the type of matrix products: the type of autocast if it is enabled, else that of the input."""
    device = tensor.device.type
    if tensor.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return tensor.dtype


def work_dtype(tensor: Tensor) -> torch.dtype:
    """Return the type of softmax, statistics and sums: at least float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in its `work_dtype`."""
    return tensor.to(work_dtype(tensor))


def no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Disable autocast, which a function inherits from its caller, so that float32 operands are not rounded."""
    return torch.autocast(tensor.device.type, enabled=False)
