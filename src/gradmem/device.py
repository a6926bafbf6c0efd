"""The device that models run on, and its clock."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from .errors import GradmemError

if TYPE_CHECKING:
    import torch


def device_named(name: str) -> torch.device:
    """Find a device by its name.

    Parameters
    ----------
    name : str
        "auto": the accelerator, or the CPU if there is none. "cpu". Or the name of the accelerator, with a number if
        there are several: "cuda", "cuda:1".

    Raises
    ------
    GradmemError
        If this machine does not have the device.
    """
    import torch  # slow to import, and not needed before a command runs

    found = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return found or torch.device("cpu")
    device: torch.device | None
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is not None and device.type == "cpu":
        return torch.device("cpu")
    count = torch.accelerator.device_count() if found else 0
    if device is None or found is None or device.type != found.type or (device.index or 0) >= count:
        others = "" if found is None else f" or {found.type}" + (f", or {found.type}:0 and so on" if count > 1 else "")
        raise GradmemError(f"this machine has no device '{name}': use auto, cpu{others}")
    return device


def clock() -> float:
    """Seconds of a clock, after the accelerator has done all its work, if there is one."""
    import torch

    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()
