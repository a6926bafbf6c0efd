"""The command `gradmem mcp`."""

from __future__ import annotations

import logging
import signal

from ..device import device_named
from ..errors import GradmemError


def mcp(
    checkpoints: list[str],
    http: bool = False,
    host: str = "127.0.0.1",
    port: int = 8001,
    timeout: float = 300.0,
    max_memories: int = 10_000,
    max_bytes: int = 2**30,
    device: str = "auto",
) -> None:
    """Serve the stored memories to a client of the Model Context Protocol, such as a chat program or an agent.

    The client starts this command and speaks to it over standard input and output. With --http, clients reach it at
    http://HOST:PORT/mcp instead. Models are loaded when they are first needed.

    Parameters
    ----------
    checkpoints
        Checkpoints and plain language models. The first one writes; memories of all of them can be asked. Default:
        smollm2, then all that gradmem serve serves.
    http
        Serve over streamable HTTP. The options --host to --max_bytes are for this.
    host
        Address to listen on. Requests need a key (gradmem keys add OWNER) unless it is a loopback address.
    port
        Port to listen on; 0 for any free port.
    timeout
        Most seconds that a request may take.
    max_memories
        Most memories of each owner of a key.
    max_bytes
        Most bytes of what each owner stores.
    device
        Device to run on: auto (an accelerator if there is one), cpu, cuda or cuda:1.
    """
    import asyncio

    try:
        from ..agents.mcp_http import http_app
        from ..agents.mcp_server import MemoryServer, run_stdio
        from ..agents.workspace import Workspace
        from ..serving.settings import Settings
        from ..serving.telemetry import LOG, JsonLines
        from ..store import Store
        from .serving import run
    except ImportError as error:
        raise GradmemError(f"an MCP server needs more packages ({error.name}): pip install 'gradmem[mcp]'") from error
    if device != "auto":
        device_named(device)  # an unknown device must fail before the server starts
    lines = logging.StreamHandler()
    lines.setFormatter(JsonLines())
    logging.basicConfig(handlers=[lines])  # the packages of the server log through this one too
    if not http:
        # Python would wait for a line of standard input before it ends. Nothing is lost: every change is a transaction.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        with Store() as store:
            asyncio.run(run_stdio(MemoryServer(Workspace(store, checkpoints, device))))
        return
    LOG.setLevel(logging.INFO)
    settings = Settings(host=host, timeout=timeout)
    with Store(max_memories=max_memories, max_bytes=max_bytes) as store:
        run(http_app(MemoryServer(Workspace(store, checkpoints, device)), settings), settings, port)
