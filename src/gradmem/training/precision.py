"""The precision of a training stage: given by the recipe, or chosen by measuring on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .recipe import Precision

MOST_ERROR = 0.2
"""Largest relative error of the meta-gradient with which `auto` chooses bf16: 17 % cost no accuracy in three seeds
(`benchmarks.experiments.precision`)."""

Gradient = Callable[[Precision], Tensor]
"""Computes the meta-gradient of a few contexts in a precision, as one vector."""


def choose_precision(wanted: Precision, device: torch.device, gradient: Gradient) -> tuple[Precision, str]:
    """Choose the precision if a recipe says `auto`.

    Parameters
    ----------
    wanted : {"auto", "fp32", "tf32", "bf16"}
    device : torch.device
    gradient : callable
        Computes the meta-gradient of a few contexts in a given precision; called only if bf16 is faster.

    Returns
    -------
    precision : {"fp32", "tf32", "bf16"}
    reason : str
        Why, for people; empty if the recipe says which precision.
    """
    if wanted != "auto":
        return wanted, ""
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return "tf32", "this GPU has tensor cores for it"
        return "fp32", "this GPU has no tensor cores for TF32"
    if device.type != "cpu":
        return "fp32", "no other precision has been tested on this device"
    if _product_seconds(torch.bfloat16) >= _product_seconds(torch.float32):
        return "fp32", "bf16 is slower on this processor"
    exact, low = gradient("fp32"), gradient("bf16")
    error = float((low - exact).norm() / exact.norm().clamp_min(torch.finfo(exact.dtype).tiny))
    # If the error is not a number, this is false.
    if error <= MOST_ERROR:
        return "bf16", f"faster here, with a relative error of {error:.1%} in the meta-gradient"
    return "fp32", f"bf16 has a relative error of {error:.1%} in the meta-gradient, and {MOST_ERROR:.0%} is allowed"


@contextmanager
def matmul_precision(precision: Precision, device: torch.device) -> Iterator[None]:
    """Within the block, compute float32 products on a GPU in TF32 (ten bits of mantissa), or exactly."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _product_seconds(dtype: torch.dtype, size: int = 256, repeats: int = 10) -> float:
    """The shortest time of a product of two square matrices, on one thread."""
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
