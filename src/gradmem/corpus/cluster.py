"""Ray without noise: a private cluster on this machine, or a running one."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..errors import GradmemError, reason, require

OBJECT_STORE = 2**28
"""Bytes of shared memory of a private cluster: what waits there are texts."""
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""No report to Ray's makers, and nothing on standard error that only its developers understand."""
PRIVATE = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_worker_niceness": "0",
}
"""A private cluster listens on the loopback address only, on Linux too; its workers are as important as their caller,
where Ray would let every other process go first."""


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
    for name, value in {**QUIET, **({} if address else PRIVATE)}.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise GradmemError(
            f"writing a corpus needs more packages ({error.name}): pip install 'gradmem[ray]'"
        ) from error
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    private = {"num_cpus": max(mine, workers or 0), "include_dashboard": False, "object_store_memory": OBJECT_STORE}
    quiet = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    try:
        with _unheard():
            ray.init(address=address or "local", **quiet, **({} if address else private))
    except Exception as error:  # it has errors of many kinds
        raise GradmemError(f"cannot {'reach' if address else 'start'} Ray: {reason(error)}") from error
    tells, logging.raiseExceptions = logging.raiseExceptions, False  # a log file on a full disk
    try:
        _hush(ray)
        yield _workers(ray.cluster_resources(), workers, gpus, shared=address is not None)
    finally:
        ray.shutdown()
        logging.raiseExceptions = tells


@contextmanager
def _unheard() -> Iterator[None]:
    """Send standard error nowhere: Ray tells there that it will be quiet."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _workers(there: dict[str, float], workers: int | None, gpus: float, shared: bool) -> Workers:
    """How many workers there are, and how many cores each has."""
    cores = int(there.get("CPU", 1))
    if gpus > there.get("GPU", 0):
        raise GradmemError(f"--gpus-per-worker {gpus:g}: Ray sees {there.get('GPU', 0):g} GPUs here")
    count = workers or (int(there["GPU"] / gpus) if gpus else cores)
    return Workers(count, 1 if shared or gpus else max(1, cores // count), gpus)


def _hush(ray: Any) -> None:
    """Keep the messages of Ray Data in its log file."""
    found = logging.getLogger("ray.data")
    found.handlers = [one for one in found.handlers if not isinstance(one, logging.StreamHandler)]
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # A batch that is lost is written in the next round.
    context.max_errored_blocks = -1
