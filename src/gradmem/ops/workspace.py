"""How much to compute at once: a constant on a CPU, where more leaves the cache; a share of the memory elsewhere."""

from __future__ import annotations

from functools import lru_cache

import torch


def elements_at_once(device: torch.device, on_cpu: int, share: int) -> int:
    """Float32 numbers to have at once.

    Parameters
    ----------
    device : torch.device
    on_cpu : int
        How many on a CPU.
    share : int
        On another device: one in `share` of those that its whole memory holds, if that is more.
    """
    return on_cpu if device.type == "cpu" else max(on_cpu, _numbers(device) // share)


@lru_cache
def _numbers(device: torch.device) -> int:
    return int(torch.accelerator.get_memory_info(device)[1]) // 4
