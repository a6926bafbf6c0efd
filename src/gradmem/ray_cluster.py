"""Ray without noise: a private cluster on this machine, or a running one."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import GradmemError, reason

OBJECT_STORE = 2**28
"""Bytes of shared memory of a private cluster: what waits there are texts, requests and answers."""
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""No report to Ray's makers, and nothing on standard error that only its developers understand."""
PRIVATE = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_worker_niceness": "0",
}
"""A private cluster listens on the loopback address only, on Linux too; its workers are as important as their caller,
where Ray would let every other process go first."""

TOKEN = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
"""Variables with the token of a running cluster, or its file. Otherwise it is in `.ray/auth_token` at home."""


def prepare(address: str | None) -> None:
    """Set the variables that Ray reads when it is imported.

    Parameters
    ----------
    address : str, optional
        As in `ray_cluster`.
    """
    for name, value in {**QUIET, **({} if address else PRIVATE)}.items():
        os.environ.setdefault(name, value)
    if address and (any(map(os.environ.get, TOKEN)) or Path("~/.ray/auth_token").expanduser().exists()):
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # `ray start` does so too, unlike `ray.init`


@contextmanager
def ray_cluster(address: str | None, cpus: int) -> Iterator[None]:
    """Start a private cluster, or connect to a running one; it ends with the block.

    Parameters
    ----------
    address : str, optional
        Of a running cluster, as `ray.init` takes it.
    cpus : int
        Cores of a private cluster.

    Raises
    ------
    GradmemError
        If Ray is not installed, or cannot be started or reached.
    """
    prepare(address)
    try:
        import ray
    except ImportError as error:
        raise GradmemError(f"Ray is not installed ({error.name}): pip install 'gradmem[ray]'") from error
    private = {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": OBJECT_STORE}
    try:
        with _unheard():
            ray.init(
                address=address or "local",
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                **({} if address else private),
            )
    except Exception as error:  # it has errors of many kinds
        token = " (it wants another token: RAY_AUTH_TOKEN)" if "InvalidAuthToken" in str(error.__cause__) else ""
        raise GradmemError(f"cannot {'reach' if address else 'start'} Ray: {reason(error)}{token}") from error
    tells, logging.raiseExceptions = logging.raiseExceptions, False  # a log file on a full disk
    try:
        yield
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
