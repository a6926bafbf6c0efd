"""Training in several processes."""

from __future__ import annotations

import os
import sys

from ..device import device_named
from ..errors import GradmemError


def launch(processes: int, device: str, arguments: list[str]) -> None:
    """Run the same command line in several processes, each on its own accelerator if there are enough.

    Otherwise they run on the CPU with one thread each: two such processes are faster than one with two threads.
    """
    import torch
    import torch.distributed.run as launcher
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    kind = device_named(device).type
    if kind != "cpu" and (count := torch.accelerator.device_count()) < processes:
        problem = f"{processes} processes and {count} {kind} device{'s' if count > 1 else ''}"
        if device != "auto":
            raise GradmemError(f"{problem}: give at most --processes {count}, or --device cpu")
        print(f"{problem}: training on the CPU", file=sys.stderr)
        kind = "cpu"
    if kind == "cpu":
        arguments = [*arguments, "--device", "cpu"]
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP warns once that it need not look for unused parameters
    try:
        launcher.main(["--standalone", f"--nproc-per-node={processes}", "-m", "gradmem", *arguments])
    except SignalException as signalled:
        raise KeyboardInterrupt("each process was stopped, and has printed what it saved") from signalled
    except ChildFailedError as error:
        raise GradmemError(f"one of {processes} training processes failed: see its own message above") from error
