"""Three clients that try to keep the server from everybody else; none of them needs to be killed to be stopped."""

from __future__ import annotations

import json
import os
import random
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import urlsplit

import httpx2

LARGE = 2**23 - 2**12
"""Bytes of a body, which are hardly less than a server takes."""
CONNECTIONS = 300
"""Of each kind, at a time."""


def large_bodies(checkpoint: str) -> list[tuple[str, bytes]]:
    """Paths and bodies that take long to parse, to check or to tokenize, or did."""

    def text(**fields: str) -> bytes:
        return json.dumps({"text": "a7:Qz", "checkpoint": checkpoint} | fields).encode()

    parts = b'{"model":"%s:x","messages":[{"role":"user","content":[%s0]}]}' % (
        checkpoint.encode(),
        b"0," * (LARGE // 2),
    )
    return [
        ("/v1/chat/completions", parts),
        ("/v1/memories/x/ask", b'{"queries":[%s0]}' % (b"[]," * (LARGE // 3))),
        ("/v1/memories", text(text="a7:Qz\n" * (LARGE // 7))),
        ("/v1/memories", text(checkpoint="k" * LARGE)),
        ("/v1/memories", json.dumps({"tags": ["x"] * (LARGE // 5)}).encode()),
        ("/v1/memories/files", LARGE.to_bytes(8, "little") + b"[" * LARGE),
    ]


class Hostile:
    """Clients on threads: one sends large bodies, one silent connections, one bodies that never arrive.

    Attributes
    ----------
    done : Counter
        What each has done: requests answered, by status, and connections made.
    """

    def __init__(self, url: str, checkpoint: str, over: threading.Event) -> None:
        self.url, self.over = url, over
        self.bodies = large_bodies(checkpoint)
        self.done: Counter[str] = Counter()
        place = urlsplit(url)
        self.place = (place.hostname or "", place.port or 80)
        head = (
            b"POST %s HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 99999\r\n\r\n{"
        )
        slow = [head % path for path in (b"/healthz", b"/v1/memories", b"/v1/chat/completions")]
        self.threads = [
            threading.Thread(target=self._again, args=(act,), daemon=True)
            for act in (self._large, lambda: self._connect([b"", b"GET / HT"]), lambda: self._connect(slow))
        ]

    def start(self) -> None:
        """Begin."""
        for thread in self.threads:
            thread.start()

    def join(self) -> None:
        """Wait until all have stopped."""
        for thread in self.threads:
            thread.join(60)

    def _again(self, act: Callable[[], None]) -> None:
        while not self.over.is_set():
            try:
                act()
            except (OSError, httpx2.HTTPError):
                self.over.wait(0.5)  # the server is down

    def _large(self) -> None:
        with httpx2.Client(base_url=self.url, timeout=60) as client:
            for path, body in self.bodies:
                if self.over.is_set():
                    return
                answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
                self.done[f"large bodies: {answer.status_code}"] += 1

    def _connect(self, beginnings: list[bytes]) -> None:
        """Hold connections for a while, and send a byte now and then."""
        held: list[socket.socket] = []
        try:
            for _ in range(CONNECTIONS):
                held.append(socket.create_connection(self.place, timeout=10))
                held[-1].sendall(random.choice(beginnings))
            self.done["connections"] += len(held)
            for _ in range(5):
                self.over.wait(1)
                for one in held:
                    with suppress(OSError):
                        one.sendall(b" ")
        finally:
            for one in held:
                one.close()


def main() -> None:
    """Attack a server, `hostile.py URL CHECKPOINT`, until standard input ends; then say what was done."""
    os.nice(10)  # its own work stands for that of other machines
    over = threading.Event()
    hostile = Hostile(*sys.argv[1:3], over)
    hostile.start()
    print("ready", flush=True)
    sys.stdin.read()
    over.set()
    hostile.join()
    print(json.dumps(dict(sorted(hostile.done.items()))))


if __name__ == "__main__":
    main()
