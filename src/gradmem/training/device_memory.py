"""What memory there is, and what was used of it: of an accelerator, or of this process."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import psutil
import torch


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated: of the device, or of the machine and the container we are in."""
    if device.type != "cpu":
        # What PyTorch has freed it keeps for itself: the device calls it taken.
        kept = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
        return int(torch.accelerator.get_memory_info(device)[0]) + int(kept)
    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - int(used))


def forget_peak(device: torch.device) -> int:
    """Start measuring peak memory anew, and return the bytes in use now."""
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        return int(torch.accelerator.memory_allocated(device))
    try:
        # What was freed goes back to the system first: otherwise a trial would be measured in the last one's memory.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        pass
    return int(psutil.Process().memory_info().rss)


def peak(device: torch.device) -> int:
    """Most bytes in use since `forget_peak`; on systems without /proc, since the process began."""
    if device.type != "cpu":
        return int(torch.accelerator.max_memory_allocated(device))
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
