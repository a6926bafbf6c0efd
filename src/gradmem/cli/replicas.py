"""`gradmem serve --ray`: start the replicas, and the front in this process."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ..corpus.cluster import PRIVATE
from ..errors import GradmemError

NAME = "gradmem"
"""Name of the application on Ray."""
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_LOG_TO_STDERR": "0"}
"""No report to Ray's makers, and no lines of Ray Serve on standard error."""
OBJECTS = 80 * 2**20
"""Bytes of the object store of a cluster that is started here: requests and answers are small."""


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
    for name, value in (QUIET | ({} if "RAY_ADDRESS" in os.environ else PRIVATE)).items():
        os.environ.setdefault(name, value)
    try:
        import ray
        from ray import serve

        from ..serving.replicas import SILENT, Options, deployment, front
        from ..serving.telemetry import LOG, failure
    except ImportError as error:
        raise GradmemError(f"replicas need more packages ({error.name}): pip install 'gradmem[ray]'") from error
    given = Options(settings=settings, **options)
    given.open_store().close()  # a wrong option must fail before a cluster starts
    own = {"address": "local"} | _own_cluster(given.max_replicas) if "RAY_ADDRESS" not in os.environ else {}
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    ray.init(logging_level=logging.ERROR, log_to_driver=False, namespace=NAME, **own)

    def deploy() -> Any:
        try:
            return serve.run(deployment(given), name=NAME, route_prefix=None)
        except RuntimeError as error:
            raise GradmemError(f"the replicas do not start: {error}") from error

    def replace() -> None:
        try:
            deploy()
        except GradmemError as error:
            LOG.error("replicas", extra={"fields": failure(error)})

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray would print its own stack
    try:
        serve.start(proxy_location="Disabled", logging_config=SILENT)
        app = front(deploy(), given)
        signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=replace, daemon=True).start())
        with suppress(KeyboardInterrupt):  # raised after the front has ended
            yield app
        serve.delete(NAME)
    finally:
        if own:
            serve.shutdown()
        ray.shutdown()


def _own_cluster(replicas: int) -> dict[str, Any]:
    """Options of a cluster on this machine: as many replicas as are wanted have room, and their replacements too."""
    return {
        "num_cpus": 2 * replicas,
        "object_store_memory": OBJECTS,
        "include_dashboard": False,
    }
