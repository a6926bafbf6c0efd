"""Free and used memory: of an accelerator, or of this machine and process."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import psutil
import torch


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated: on the device, or on this machine within the limit of its container."""
    if device.type != "cpu":
        # PyTorch keeps memory that it has freed, and the device counts that as used.
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
    """Restart the measurement of peak memory; return the bytes in use now."""
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        return int(torch.accelerator.memory_allocated(device))
    try:
        # Return freed memory to the system first: otherwise a trial would reuse that of the one before, uncounted.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        pass
    return int(psutil.Process().memory_info().rss)


def peak(device: torch.device) -> int:
    """Largest number of bytes in use since `forget_peak`; on systems without /proc, since the process started."""
    if device.type != "cpu":
        return int(torch.accelerator.max_memory_allocated(device))
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
