"""Many clients use one server, two servers, and one and two replicas on Ray, all on one PostgreSQL.

GRADMEM_STORE must be the URL of an empty database. Nothing is killed. Each kind of server is used by new clients for
some seconds, after its checkpoint is loaded; `clients.py` says what they do.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from clients import CHECKPOINT, PATIENCE, Account, User
from load import compare, quantiles
from rich.console import Console
from rich.table import Table
from served import Server

from gradmem import Client
from gradmem.store import Store

KINDS = {
    "1 process": (1, ()),
    "2 processes": (2, ()),
    "Ray, 1 replica": (1, ("--ray", "--max_replicas", "1")),
    "Ray, 2 replicas": (1, ("--ray", "--min_replicas", "2", "--max_replicas", "2")),
}
"""Number of servers, and their arguments."""


def processor_seconds(servers: list[Server]) -> float:
    """Seconds that cores have spent on servers and the processes that they started."""
    total = 0.0
    for server in servers:
        process = psutil.Process(server.process.pid)
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                total += sum(one.cpu_times()[:2])
    return total


def use(servers: list[Server], clients: int, seconds: float, called: str) -> dict[str, Any]:
    """Let clients use servers, and compare the store with what they were told."""
    account, over, urls = Account(), threading.Event(), [one.url for one in servers]
    for url in urls:  # so that its checkpoint is loaded; replicas have loaded theirs
        with Client(url) as client:
            client.write("a7:Qz", CHECKPOINT)
    users = [User(number, urls[number % len(urls)], account, over, called) for number in range(clients)]
    started, spent = time.monotonic(), processor_seconds(servers)
    for user in users:
        user.start()
    time.sleep(seconds)
    over.set()
    for user in users:
        user.join(PATIENCE)
    taken, spent = time.monotonic() - started, processor_seconds(servers) - spent
    with Store() as store:
        wrong = account.wrong + [line for user in users for line in compare(store, user)]
    every = [one for kind in account.seconds.values() for one in kind]
    return {
        "requests_per_s": len(every) / taken,
        "processor_ms_per_request": 1000 * spent / max(1, len(every)),
        "failed": sum(account.failed.values()),
        "wrong": wrong,
        "by_kind": {kind: {"answered": len(each), **quantiles(each)} for kind, each in sorted(account.seconds.items())},
    }


def main() -> None:
    """Command line."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    command.add_argument("--clients", type=int, default=64, help="at a time")
    command.add_argument("--seconds", type=float, default=30.0, help="for each kind of server")
    command.add_argument("--only", choices=KINDS, nargs="+", default=list(KINDS), help="kinds of servers")
    command.add_argument("--json", type=Path, metavar="FILE", help="save the figures")
    options = command.parse_args()
    built = Table(title=f"{options.clients} clients, {options.seconds:g} s each")
    headings = (
        "servers",
        "requests/s",
        "core ms/request",
        "ask p50, s",
        "ask p99, s",
        "write p50, s",
        "write p99, s",
        "failed",
        "wrong",
    )
    for heading in headings:
        built.add_column(heading, justify="left" if heading == "servers" else "right")
    found: dict[str, Any] = {"load_average": []}
    for kind in options.only:
        count, arguments = KINDS[kind]
        with tempfile.TemporaryDirectory() as folder:
            places = [Path(folder, str(number)) for number in range(count)]
            for place in places:
                place.mkdir()
            given = (CHECKPOINT, "--rate", "1000000", *arguments)
            servers = [Server(place, *given, store=os.environ["GRADMEM_STORE"]) for place in places]
            try:
                row = use(servers, options.clients, options.seconds, "".join(filter(str.isalnum, kind)))
            finally:
                for one in servers:
                    one.stop()
        found[kind] = row
        found["load_average"].append(os.getloadavg()[0])
        times = [row["by_kind"].get(what, {}) for what in ("ask", "write")]
        numbers = [f"{one.get(what, float('nan')):.2f}" for one in times for what in ("p50_s", "p99_s")]
        built.add_row(
            kind,
            f"{row['requests_per_s']:.1f}",
            f"{row['processor_ms_per_request']:.0f}",
            *numbers,
            str(row["failed"]),
            str(len(row["wrong"])),
        )
    Console(width=140).print(built, f"load average after each: {found['load_average']}", sep="\n")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
