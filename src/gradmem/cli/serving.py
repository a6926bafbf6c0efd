"""The commands `gradmem serve` and `gradmem keys`."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from typing import Any

from ..device import device_named
from ..errors import GradmemError
from ..model.packaged import served_names
from ..serving.api_keys import ApiKeys
from .console import console


def serve(
    checkpoints: list[str],
    host: str = "127.0.0.1",
    port: int = 8000,
    max_body: int = 2**23,
    rate: int = 6000,
    timeout: float = 300.0,
    max_memories: int = 10_000,
    max_bytes: int = 2**30,
    device: str = "auto",
    upstream: str | None = None,
    ray: bool = False,
    min_replicas: int = 1,
    max_replicas: int = 4,
) -> None:
    """Serve the stored memories over HTTP, with a web page.

    Parameters
    ----------
    checkpoints
        Checkpoints and plain language models to serve. Default: all that `gradmem list` shows, after the language
        models that are installed as Python packages.
    host
        Address to listen on. Requests need a key (gradmem keys add OWNER) unless it is a loopback address.
    port
        Port to listen on; 0 for any free port.
    max_body
        Most bytes of a request.
    rate
        Most requests per minute of one key, or of one address without a key.
    timeout
        Most seconds that a request may take.
    max_memories
        Most memories of each owner of a key.
    max_bytes
        Most bytes of the memory files of each owner, with all versions.
    device
        Device to run on: auto (an accelerator if there is one), cpu, cuda or cuda:1.
    upstream
        Base URL of a vLLM server (--enable-prompt-embeds), such as http://127.0.0.1:8001/v1, that answers queries to
        the memories of the one checkpoint named. It is sent prompt embeddings made here (GRADMEM_UPSTREAM_KEY: its
        API key).
    ray
        Serve with replicas on Ray (RAY_ADDRESS: a running cluster; by default one on this machine). Several need a
        store on PostgreSQL. SIGHUP replaces them one by one, which load the checkpoints anew.
    min_replicas
        Fewest replicas on Ray.
    max_replicas
        Most replicas on Ray. As many run as the load needs.
    """
    try:
        from ..serving.app import create_app
        from ..serving.settings import Settings
        from ..serving.telemetry import LOG, JsonLines
        from ..serving.upstream import checked_url
        from ..store import Store
    except ImportError as error:
        raise GradmemError(f"serving needs more packages ({error.name}): pip install 'gradmem[serve]'") from error
    served = tuple(checkpoints or served_names())
    device = str(device_named(device))  # an unknown device must fail before the server starts
    settings = Settings(
        host=host,
        checkpoints=served,
        max_body=max_body,
        rate=rate,
        timeout=timeout,
        device=device,
        upstream=upstream and checked_url(upstream),
    )
    quota: dict[str, Any] = {"max_memories": max_memories, "max_bytes": max_bytes}
    lines = logging.StreamHandler()
    lines.setFormatter(JsonLines())
    LOG.addHandler(lines)
    LOG.setLevel(logging.INFO)
    logging.getLogger("uvicorn").addHandler(lines)
    if ray:
        from .replicas import replicated

        replicas = {"min_replicas": min_replicas, "max_replicas": max_replicas, "preload": bool(checkpoints)}
        with replicated(settings, **replicas, **quota) as app:
            run(app, settings, port)
    else:
        run(create_app(Store(**quota), settings), settings, port)


def run(app: Any, settings: Any, port: int) -> None:
    """Print the URL of a server, and run its application until the process is told to stop."""
    import uvicorn

    from ..serving.connections import Connection, Server, connection_limit

    config = uvicorn.Config(
        app,
        http=Connection,
        loop="asyncio",  # uvicorn would take uvloop where it is installed, on which no promise is tested
        ws="none",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=connection_limit(4 * settings.max_requests),
        backlog=256,
        timeout_graceful_shutdown=30,
    )
    with _listening(settings.host, port) as listener:
        shown = f"[{settings.host}]" if ":" in settings.host else settings.host
        # Programs wait for this line: from now on the server accepts connections.
        print(f"http://{shown}:{listener.getsockname()[1]}", flush=True)
        Server(config).run(sockets=[listener])


def _listening(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError, UnicodeError) as error:
        raise GradmemError(f"cannot listen on {host}, port {port}: {error}") from error


def add(owner: str) -> str:
    """Make an API key and print it. Only its hash is stored, so it cannot be shown again.

    Parameters
    ----------
    owner
        Owner of the memories that the key gives access to.
    """
    key = ApiKeys().add(owner)
    print(key)
    return key


def ls() -> dict[str, str]:
    """List the owners of keys, and the times at which the keys were made."""
    found = ApiKeys().owners()
    for owner, created in found.items():
        console.print(f"{owner} {created}", markup=False, highlight=False)
    return found


def rm(owner: str) -> None:
    """Remove the key of an owner, also from a running server. The memories of the owner stay.

    Parameters
    ----------
    owner
        Owner of the key.
    """
    ApiKeys().remove(owner)


KEYS: dict[str, Callable[..., Any]] = {"add": add, "ls": ls, "rm": rm}
