"""Many clients use one server that is killed again and again, and keep account of what it acknowledged.

Then as many use one that is not killed: without, and with three hostile clients beside them (`hostile.py`), whom nobody
else should notice much.

`make load` runs it for ten minutes with 64 clients and prints the tables; `test_load.py` runs it for less.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from clients import CHECKPOINT, PATIENCE, Account, User
from rich.console import Console
from rich.table import Table
from served import Server

from gradmem.receipts import text_digest
from gradmem.store import Store


class Killer:
    """Starts the server, and ends it at random moments, mostly with SIGKILL."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.draw = folder, random.Random(seed)
        self.ended: Counter[str] = Counter()
        self.starting: list[float] = []
        self.ending: list[float] = []
        self.logs = ""
        self.resident = 0
        self.server = Server(folder, CHECKPOINT, "--rate", "1000000")
        self.url = self.server.url

    def watch(self, seconds: float) -> None:
        """Let some time pass; note how much memory the server takes."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.resident = max(self.resident, psutil.Process(self.server.process.pid).memory_info().rss)
            time.sleep(min(1.0, left))

    def end(self, how: signal.Signals) -> None:
        """End the server."""
        started = time.monotonic()
        self.server.process.send_signal(how)
        self.server.process.wait(PATIENCE)
        self.ended[how.name] += 1
        if how == signal.SIGTERM:
            self.ending.append(time.monotonic() - started)
        self.logs += self.server.log.read_text()

    def restart(self) -> None:
        """End it somehow, and start it where it was."""
        self.end(self.draw.choices((signal.SIGKILL, signal.SIGTERM), (4, 1))[0])
        started = time.monotonic()
        port = self.url.rpartition(":")[2]
        self.server = Server(self.folder, CHECKPOINT, "--rate", "1000000", "--port", port)
        self.starting.append(time.monotonic() - started)


@dataclass
class Result:
    """What a run was, and all that went wrong in it."""

    clients: int
    seconds: float
    account: Account
    killer: Killer
    acknowledged: int

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        seconds = self.account.seconds
        every = [one for kind in seconds.values() for one in kind]
        return {
            "clients": self.clients,
            "seconds": self.seconds,
            "requests_answered": len(every),
            "requests_per_s": len(every) / self.seconds,
            "by_kind": {kind: {"answered": len(each), **quantiles(each)} for kind, each in sorted(seconds.items())},
            "failed": {f"{kind}: {what}": count for (kind, what), count in sorted(self.account.failed.items())},
            "ended": dict(self.killer.ended),
            "start_s": quantiles(self.killer.starting),
            "sigterm_s": quantiles(self.killer.ending),
            "resident_bytes": self.killer.resident,
            "memories_acknowledged": self.acknowledged,
            "right": self.account.right / max(1, self.account.asked),
            "wrong": self.account.wrong,
        }


def run(folder: Path, minutes: float, clients: int, pause: tuple[float, float], seed: int = 0) -> Result:
    """Let clients use a server that is ended after pauses of random length, and compare it with what they know."""
    killer, account, over = Killer(folder, seed), Account(), threading.Event()
    users = [User(number, killer.url, account, over) for number in range(clients)]
    started = time.monotonic()
    for user in users:
        user.start()
    while (left := started + 60 * minutes - time.monotonic()) > 0:
        killer.watch(min(left, killer.draw.uniform(*pause)))
        if time.monotonic() < started + 60 * minutes:
            killer.restart()
    killer.end(signal.SIGKILL)
    seconds = time.monotonic() - started
    over.set()
    for user in users:
        user.join(PATIENCE)
        if user.is_alive():
            account.wrong.append(f"{user.prefix} never came back")
    for line in killer.logs.splitlines():
        if '"status": 500' in line or "Traceback" in line:
            account.wrong.append(line)
    with Store(folder / "store.db") as store:
        for user in users:
            account.wrong += compare(store, user)
    return Result(clients, seconds, account, killer, sum(len(user.kept) for user in users))


def compare(store: Store, user: User) -> list[str]:
    """What a store has otherwise than a user was told."""
    listed = {entry.name: entry for entry in store.list(limit=1000, tags=user.prefix)}
    wrong = [f"neither kept nor unsure: {name}" for name in listed.keys() - user.kept.keys() - user.unsure.keys()]
    for name, entry in listed.items():
        versions = len(store.versions(entry.id))
        if name in user.kept and versions - len(user.kept[name].texts) not in (0, bool(user.kept[name].appending)):
            wrong.append(f"{name} has {versions} versions")
        store.load(entry.id)  # raises where anything of it is missing or damaged
    for name, kept in user.kept.items():
        if name not in listed:
            wrong.append(f"lost: {name}")
            continue
        receipts = store.load(listed[name].id, version=1).receipts
        if receipts[0].context_sha256 != text_digest(kept.texts[0]):
            wrong.append(f"{name} was written from another text")
    return wrong


def quantiles(values: list[float]) -> dict[str, float]:
    found = np.quantile(values, [0.5, 0.99]) if values else [float("nan")] * 2
    return {"p50_s": float(found[0]), "p99_s": float(found[1])}


def table(row: dict[str, Any]) -> Table:
    """What happened, by kind of request."""
    built = Table(
        title=f"{row['clients']} clients, {row['seconds'] / 60:.1f} minutes, server ended {row['ended']}",
        caption=f"{row['requests_answered']:,} requests answered ({row['requests_per_s']:.1f}/s), "
        f"{sum(row['failed'].values()):,} ended in a clear error; {row['memories_acknowledged']:,} memories "
        f"acknowledged and kept; {len(row['wrong'])} things wrong; {row['right']:.2%} of the answers right; "
        f"server: at most {row['resident_bytes'] / 2**20:.0f} MB, started in {row['start_s']['p50_s']:.1f} s, after "
        f"SIGTERM ended in {row['sigterm_s']['p50_s']:.1f} s (medians)",
    )
    for heading in ("request", "answered", "p50, s", "p99, s", "server down", "busy"):
        built.add_column(heading, justify="left" if heading == "request" else "right")
    for kind, one in row["by_kind"].items():
        failed = [str(row["failed"].get(f"{kind}: {what}", 0)) for what in ("server down", "busy (429)")]
        built.add_row(kind, f"{one['answered']:,}", f"{one['p50_s']:.2f}", f"{one['p99_s']:.2f}", *failed)
    return built


def main() -> int:
    """Command line."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    command.add_argument("--minutes", type=float, default=10.0, help="how long")
    command.add_argument("--clients", type=int, default=64, help="at a time")
    command.add_argument("--pause", type=float, nargs=2, default=(10.0, 40.0), help="seconds between two kills")
    command.add_argument("--seed", type=int, default=0, help="of kills")
    command.add_argument("--only", choices=("killed", "hostile"), help="one of the two runs")
    command.add_argument("--json", type=Path, metavar="FILE", help="save the figures")
    options = command.parse_args()
    from beside import beside, beside_table  # which use this module

    found: dict[str, Any] = {}
    if options.only != "hostile":
        with tempfile.TemporaryDirectory() as folder:
            killed = run(Path(folder), options.minutes, options.clients, tuple(options.pause), options.seed).to_dict()
        Console().print(table(killed), *killed["wrong"][:20], sep="\n")
        found["killed"] = killed
    if options.only != "killed":
        with tempfile.TemporaryDirectory() as folder:
            compared = beside(Path(folder), options.minutes, options.clients)
        Console().print(beside_table(compared), *compared["wrong"][:20], sep="\n")
        found["hostile"] = compared
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return any(one["wrong"] for one in found.values())


if __name__ == "__main__":
    sys.exit(main())
