"""The size of work memory: a constant on a CPU, so that it fits the cache; a share of the memory on other devices."""

from __future__ import annotations

from functools import lru_cache

import torch


def elements_at_once(device: torch.device, on_cpu: int, share: int) -> int:
    """Return how many float32 numbers to hold at once.

    Parameters
    ----------
    device : torch.device
    on_cpu : int
        The number on a CPU, and the least on any device.
    share : int
        On other devices: one in `share` of the numbers that the whole memory holds.
    """
    return on_cpu if device.type == "cpu" else max(on_cpu, _numbers(device) // share)


@lru_cache
def _numbers(device: torch.device) -> int:
    return int(torch.accelerator.get_memory_info(device)[1]) // 4
