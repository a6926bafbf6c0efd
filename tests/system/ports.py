"""Ports for programs that have to be told one before they start."""

from __future__ import annotations

import random
import socket
from contextlib import suppress


def free_port() -> int:
    """A port that nobody listens on, and that the system gives to nobody who asks for any.

    The port of a closed listener on port 0 would be given to the next connection, before a slow program listens.
    """
    draw = random.SystemRandom()
    for _ in range(100):
        port = draw.randrange(20_000, 32_000)  # Ray gives its workers those below, Linux whoever asks those above
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no free port")
