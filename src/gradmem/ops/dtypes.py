"""Types that closed forms compute in, under autocast or not."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


def product_dtype(tensor: Tensor) -> torch.dtype:
    """Type of the matrix products: that of the input or, as for PyTorch's own, that of autocast."""
    device = tensor.device.type
    if tensor.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return tensor.dtype


def work_dtype(tensor: Tensor) -> torch.dtype:
    """Type of softmax, statistics and sums: at least float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Keep autocast, which a function inherits from its caller, from rounding float32 operands."""
    return torch.autocast(tensor.device.type, enabled=False)
