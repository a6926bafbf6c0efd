"""`gradmem serve --ray`: start the replicas, and the front in this process."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ..errors import GradmemError
from ..ray_cluster import prepare, ray_cluster

NAME = "gradmem"
"""Name of the application on Ray."""
UPDATE_SECONDS = 30.0
"""Seconds for which the end waits for replicas that are just being replaced."""


@contextmanager
def replicated(settings: Any, **options: Any) -> Iterator[Any]:
    """Start replicas, on a new cluster unless there is one, and end them after the block.

    Parameters
    ----------
    settings : Settings
    options
        Those of `gradmem.serving.replicas.Options`.

    Yields
    ------
    ASGI application
        What clients reach; see `gradmem.serving.replicas.front`. SIGHUP replaces the replicas.

    Raises
    ------
    GradmemError
        If the packages are not installed, an option is wrong, or the replicas do not start.
    """
    address = os.environ.get("RAY_ADDRESS")
    prepare(address)
    try:
        from ray import serve

        from ..serving.replicas import SILENT, Options, deployment, front
        from ..serving.telemetry import LOG, failure
    except ImportError as error:
        raise GradmemError(f"replicas need more packages ({error.name}): pip install 'gradmem[ray]'") from error
    given = Options(settings=settings, **options)
    given.open_store().close()  # a wrong option must fail before a cluster starts
    logging.getLogger("ray.serve").setLevel(logging.ERROR)

    def deploy() -> Any:
        try:
            return serve.run(deployment(given), name=NAME, route_prefix=None)
        except RuntimeError as error:
            raise GradmemError(f"the replicas do not start: {error}") from error

    turn, ended = threading.Lock(), threading.Event()

    def replace() -> None:
        with turn:
            if ended.is_set():
                return
            try:
                deploy()
            except GradmemError as error:
                LOG.error("replicas", extra={"fields": failure(error)})

    # As many replicas as are wanted have room, and their replacements too.
    with ray_cluster(address, cpus=2 * given.max_replicas):
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray would print its own stack
        try:
            serve.start(proxy_location="Disabled", logging_config=SILENT)
            app = front(deploy(), given)
            signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=replace, daemon=True).start())
            with suppress(KeyboardInterrupt):  # raised after the front has ended
                yield app
            ended.set()
            turn.acquire(timeout=UPDATE_SECONDS)  # whoever deploys after the end would start another Ray
            serve.delete(NAME)
        finally:
            if not address:
                serve.shutdown()
