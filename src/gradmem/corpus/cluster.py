"""The cluster that a corpus is written on."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..errors import GradmemError, require
from ..ray_cluster import ray_cluster


@dataclass(frozen=True)
class Workers:
    """The processes that write.

    Attributes
    ----------
    count : int
    cpus : int
        Cores of each, for its threads.
    gpus : float
        GPUs of each.
    """

    count: int
    cpus: int
    gpus: float

    @property
    def resources(self) -> dict[str, Any]:
        """What Ray reserves for each."""
        return {"num_cpus": self.cpus, **({"num_gpus": self.gpus} if self.gpus else {})}


@contextmanager
def cluster(address: str | None, workers: int | None, gpus: float) -> Iterator[Workers]:
    """Start a private cluster, or connect to a running one; it ends with the block.

    Parameters
    ----------
    address : str, optional
        Of a running cluster, as `ray.init` takes it.
    workers : int, optional
        By default one for each core, or for each share of the GPUs.
    gpus : float
        GPUs of each worker.

    Raises
    ------
    GradmemError
        If Ray is not installed, cannot be started or reached, or has no such GPUs.
    """
    require("--workers", workers, workers is None or workers >= 1, "at least 1")
    require("--gpus-per-worker", gpus, gpus >= 0 and (gpus <= 1 or gpus == int(gpus)), "a part of 1, or whole GPUs")
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ray_cluster(address, max(mine, workers or 0)):
        import ray

        _hush()
        yield _workers(ray.cluster_resources(), workers, gpus, shared=address is not None)


def _workers(there: dict[str, float], workers: int | None, gpus: float, shared: bool) -> Workers:
    """How many workers there are, and how many cores each has."""
    cores = int(there.get("CPU", 1))
    if gpus > there.get("GPU", 0):
        raise GradmemError(f"--gpus-per-worker {gpus:g}: Ray sees {there.get('GPU', 0):g} GPUs here")
    count = workers or (int(there["GPU"] / gpus) if gpus else cores)
    return Workers(count, 1 if shared or gpus else max(1, cores // count), gpus)


def _hush() -> None:
    """Keep the messages of Ray Data in its log file."""
    try:
        from ray.data import DataContext
    except ImportError as error:
        raise GradmemError(
            f"writing a corpus needs more packages ({error.name}): pip install 'gradmem[ray]'"
        ) from error
    found = logging.getLogger("ray.data")
    found.handlers = [one for one in found.handlers if not isinstance(one, logging.StreamHandler)]
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # A batch that is lost is written in the next round.
    context.max_errored_blocks = -1
