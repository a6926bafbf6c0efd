"""Three clients that try to keep the server from everybody else; none of them needs to be killed to be stopped."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
from load import CHECKPOINT, PATIENCE, Account, Killer, User, quantiles
from rich.table import Table

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


class Apart:
    """`Hostile` in a process of its own, which leaves the processor to others: it stands for other machines."""

    def __init__(self, url: str, checkpoint: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.over, self._done = context.Event(), context.Queue()
        self.process = context.Process(target=_attack, args=(url, checkpoint, self.over, self._done), daemon=True)

    def start(self) -> None:
        """Begin."""
        self.process.start()

    def stop(self) -> dict[str, int]:
        """What was done until now, which is all."""
        self.over.set()
        done: dict[str, int] = self._done.get(timeout=PATIENCE)
        self.process.join()
        return done


def _attack(url: str, checkpoint: str, over: Any, done: Any) -> None:
    os.nice(19)
    hostile = Hostile(url, checkpoint, over)
    hostile.start()
    over.wait()
    hostile.join()
    done.put(dict(hostile.done))


def beside(folder: Path, minutes: float, clients: int) -> dict[str, Any]:
    """Let clients use a server half of the time alone, and half of it beside hostile ones; compare their times."""
    killer, quiet, loud = Killer(folder, 0), Account(), Account()
    done: dict[str, int] = {}
    for account, with_hostile in ((quiet, False), (loud, True)):
        over = threading.Event()
        users = [
            User(number, killer.url, account, over, f"{'loud' if with_hostile else 'quiet'}")
            for number in range(clients)
        ]
        hostile = Apart(killer.url, CHECKPOINT)
        for one in (*users, *([hostile] if with_hostile else [])):
            one.start()
        killer.watch(30 * minutes)
        over.set()
        for user in users:
            user.join(PATIENCE)
        if with_hostile:
            done = dict(sorted(hostile.stop().items()))
    killer.end(signal.SIGTERM)
    wrong = [*quiet.wrong, *loud.wrong, *(line for line in killer.logs.splitlines() if '"status": 500' in line)]
    rows = {
        kind: {"alone": quantiles(quiet.seconds[kind]), "beside": quantiles(loud.seconds[kind])}
        for kind in sorted(quiet.seconds.keys() & loud.seconds.keys())
    }
    every = [[one for each in account.seconds.values() for one in each] for account in (quiet, loud)]
    rows["all"] = {"alone": quantiles(every[0]), "beside": quantiles(every[1])}
    return {
        "clients": clients,
        "answered": {"alone": len(every[0]), "beside": len(every[1])},
        "failed": {"alone": sum(quiet.failed.values()), "beside": sum(loud.failed.values())},
        "by_kind": rows,
        "hostile": done,
        "resident_bytes": killer.resident,
        "wrong": wrong,
    }


def beside_table(row: dict[str, Any]) -> Table:
    """Times of honest requests without and with hostile clients."""
    answered, failed = row["answered"], row["failed"]
    built = Table(
        title=f"{row['clients']} clients, alone and beside three hostile ones",
        caption=f"{answered['alone']:,} and {answered['beside']:,} honest requests answered, {failed['alone']} and "
        f"{failed['beside']} refused; hostile: {row['hostile']}; server: at most "
        f"{row['resident_bytes'] / 2**20:.0f} MB; {len(row['wrong'])} things wrong",
    )
    for heading in ("request", "p50 alone, s", "p50 beside, s", "p99 alone, s", "p99 beside, s", "p99 ratio"):
        built.add_column(heading, justify="left" if heading == "request" else "right")
    for kind, one in row["by_kind"].items():
        numbers = [one[which][what] for what in ("p50_s", "p99_s") for which in ("alone", "beside")]
        built.add_row(kind, *(f"{number:.2f}" for number in numbers), f"{numbers[3] / numbers[2]:.1f}")
    return built
