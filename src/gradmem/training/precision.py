"""The precision that a stage of training computes in: given, or chosen by what is measured here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .recipe import Precision

MOST_ERROR = 0.05
"""Largest relative error of a meta-gradient in bf16 with which `auto` takes it."""

Gradient = Callable[[Precision], Tensor]
"""The meta-gradient of a few contexts in a precision, flattened."""


def choose_precision(wanted: Precision, device: torch.device, gradient: Gradient) -> tuple[Precision, str]:
    """Choose where a recipe says `auto`; otherwise take its word.

    Parameters
    ----------
    wanted : {"auto", "fp32", "tf32", "bf16"}
    device : torch.device
    gradient : callable
        Called where bf16 is faster: the meta-gradient of a few contexts in the precision that it is given.

    Returns
    -------
    precision : {"fp32", "tf32", "bf16"}
    reason : str
        For people; empty where the recipe was taken at its word.
    """
    if wanted != "auto":
        return wanted, ""
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return "tf32", "this GPU has tensor cores for it, and the meta-gradient keeps its direction"
        return "fp32", "this GPU has no tensor cores for TF32"
    if device.type != "cpu":
        return "fp32", "nothing else was measured on this device"
    if _product_seconds(torch.bfloat16) >= _product_seconds(torch.float32):
        return "fp32", "bf16 is slower on this processor"
    exact, low = gradient("fp32"), gradient("bf16")
    error = float((low - exact).norm() / exact.norm().clamp_min(torch.finfo(exact.dtype).tiny))
    # Not a number compares as false.
    if error <= MOST_ERROR:
        return "bf16", f"faster here, and the meta-gradient is {error:.1%} off"
    return "fp32", f"in bf16 the meta-gradient is {error:.1%} off; at most {MOST_ERROR:.0%} may be"


@contextmanager
def matmul_precision(precision: Precision, device: torch.device) -> Iterator[None]:
    """Let float32 products on a GPU use TF32 (ten bits of mantissa) for the duration, or keep them exact."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _product_seconds(dtype: torch.dtype, size: int = 256, repeats: int = 10) -> float:
    """The least time of a product of two square matrices on one thread; several disturb each other."""
    matrix, threads, times = torch.ones(size, size, dtype=dtype), torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for _ in range(repeats):
            start = time.perf_counter()
            matrix @ matrix
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return min(times)
