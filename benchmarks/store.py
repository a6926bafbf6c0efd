"""A store with many memories: lookup by id and name, listing by each filter, puts and deletes one by one.

The rows are made by the database, with payloads as large as those of `kv-32` or of another size. Of all memories, a
tenth is of each of ten checkpoints, half have the tag `half`, every thousandth the tag `rare`, and one was created at
every minute. A listing is of one page of 50. Timed from Python, with the first calls, which open connections, left out.
On a machine that does other work the clock measures that too. The own times do not have what this process, and the
PostgreSQL server's process for it, waited for a core (Linux; the server on this machine). With --place the store must
be empty; by default it is a SQLite file in a temporary folder.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sqlalchemy import text

import gradmem
from benchmarks.common import Row, machine, measure, parser, report
from benchmarks.store_rows import BEGIN, fill, identity, name
from gradmem import Memory, Receipt
from gradmem.store import Store
from gradmem.store import database as db

WARM = 5
TOKENS = 225


def made(number: int) -> Memory:
    """Make a memory of the size that `kv-32` writes."""
    numbers = np.random.default_rng(number).random(TOKENS).round(3).tolist()
    about: dict[str, Any] = {"method": "gradmem", "model": "kv-32", "context_tokens": TOKENS, "steps": 5}
    about |= dict.fromkeys(("backbone", "checkpoint", "tokenizer", "context_sha256"), "0" * 64)
    about |= {"losses": numbers[:6], "token_losses": numbers, "inner_lr": [0.5] * 8}
    return Memory({"memory": torch.randn(1, 8, 128)}, [Receipt(**about)])


def server(store: Store) -> Path | None:
    """File of the times of the server's process for this one, if it is on this machine."""
    with store._session.engine.connect() as connection:
        if connection.dialect.name != "postgresql":
            return None
        file = Path(f"/proc/{connection.scalar(text('SELECT pg_backend_pid()'))}/schedstat")
    return file if file.exists() else None


def job(what: str, call: Callable[[int], Any], repeats: int, worker: Path | None = None, warm: int = WARM) -> Row:
    """Time a call with the numbers from 0 on, by the clock and without the time of waiting for a core."""
    files = [file for file in (Path("/proc/self/schedstat"), worker) if file is not None and file.exists()]

    def waited() -> float:
        return sum(int(file.read_text().split()[1]) for file in files) / 1e9

    times = []
    for number in range(repeats + warm):
        queued, started = waited(), time.perf_counter()
        found = call(number)
        took = time.perf_counter() - started
        times.append([1000 * took, 1000 * (took - (waited() - queued))])
    shown = len(found) if isinstance(found, list) else None
    (p50, own50), (p99, own99) = np.percentile(times[warm:], [50, 99], axis=0).tolist()
    figures = {"p50_ms": p50, "p99_ms": p99, "own_p50_ms": own50, "own_p99_ms": own99}
    return {"operation": what, **figures, "calls": repeats, "listed": shown}


def jobs(store: Store, count: int, lookups: int, repeats: int) -> list[Callable[[], Row]]:
    """Lookups of random memories, and listings."""
    drawn = np.random.default_rng(0).integers(count, size=lookups + WARM).tolist()
    by: dict[str, Callable[[int], Any]] = {
        "get by id": lambda i: store.get(identity(drawn[i])),
        "get by name": lambda i: store.get(name(drawn[i])),
        "read by id (bytes, checksum)": lambda i: store.read(identity(drawn[i])),
    }
    middle = BEGIN + timedelta(minutes=count // 2)
    [oldest] = store.list(since=BEGIN, until=BEGIN + timedelta(minutes=1))
    [in_the_middle] = store.list(since=middle, until=middle + timedelta(minutes=1))
    listings: dict[str, dict[str, Any]] = {
        "list": {},
        "list from the middle on": {"after": in_the_middle.cursor},
        "list after the last": {"after": oldest.cursor},
        "list by checkpoint": {"checkpoint": f"{3:064x}"},
        "list by model": {"checkpoint": "model-3"},
        "list by unknown checkpoint": {"checkpoint": "none"},
        "list by name": {"name": name(7)},
        "list by name, 100 begin so": {"name": name(count // 2)[:-2] + "*"},
        "list by name, all begin so": {"name": "name-*"},
        "list by name, all begin so, from the middle on": {"name": "name-*", "after": in_the_middle.cursor},
        "list by tag of half": {"tags": "half"},
        "list by tag of a thousandth": {"tags": "rare"},
        "list by both tags": {"tags": "half,rare"},
        "list by unknown tag": {"tags": "none"},
        "list by date": {"since": middle, "until": middle + timedelta(days=1)},
        "list by tag and date": {"tags": "half", "until": middle},
        "list by tag and checkpoint": {"tags": "half", "checkpoint": "model-4"},
        "list by tag and beginning of names": {"tags": "half", "name": "name-*"},
        "list by rare tag and checkpoint, none": {"tags": "rare", "checkpoint": "model-3"},
    }
    worker = server(store)
    timed: list[Callable[[], Row]] = [partial(job, what, call, lookups, worker) for what, call in by.items()]
    timed += [partial(job, what, partial(page, store, given), repeats, worker) for what, given in listings.items()]
    worst = partial(page, store, {"tags": "half", "checkpoint": "model-3"})  # it looks at half of all memories

    def stopped(number: int) -> None:
        with suppress(gradmem.GradmemError):  # it took too long
            worst(number)

    return [*timed, partial(job, "list by tag and checkpoint, none", stopped, 1, worker, warm=0)]


def page(store: Store, filters: dict[str, Any], _: int) -> Any:
    """One page of a listing."""
    return store.list(**filters)


def run(place: str, options: argparse.Namespace) -> list[Row]:
    """Fill a store and measure it."""
    with Store(place) as store:
        if store.list():
            raise SystemExit(f"{place} is not empty: it would be filled with {options.memories:,} memories")
        engine = db.connect(db.locate(place), create=True)
        fill(engine, options.memories, options.payload)
        engine.dispose()
    return measured(place, options)


def measured(place: str, options: argparse.Namespace) -> list[Row]:
    """Measure a store that has been filled."""
    with Store(place, max_memories=10**9, max_bytes=10**15) as store:
        before = scans(store)
        rows = measure("store", jobs(store, options.memories, options.lookups, options.repeats))
        if scans(store) != before:
            print("a large table was read from one end to the other")
        fresh = [made(number + 1) for number in range(options.puts + WARM)]
        drawn = np.random.default_rng(1).permutation(options.memories)[: options.puts + WARM].tolist()
        changes = {
            "put, on the disk, with a quota": lambda i: store.put(fresh[i], tags="new"),
            "delete": lambda i: store.delete(identity(drawn[i])),
        }
        return [*rows, *(job(what, call, options.puts, server(store)) for what, call in changes.items())]


def scans(store: Store) -> int:
    """How often PostgreSQL has read a large table as a whole."""
    with store._session.engine.connect() as connection:
        if connection.dialect.name != "postgresql":
            return 0
        connection.execute(text("SELECT pg_stat_force_next_flush()"))
        connection.commit()
        large = "relname IN ('gradmem_memories', 'gradmem_versions', 'gradmem_tags')"
        return connection.scalar(text(f"SELECT SUM(seq_scan) FROM pg_stat_user_tables WHERE {large}")) or 0


def main() -> None:
    """Command line."""
    command = parser(__doc__, repeats=100)
    command.add_argument("--memories", type=int, default=100_000, metavar="N", help="memories in the store")
    command.add_argument("--payload", type=int, default=7000, metavar="N", help="bytes of each payload")
    command.add_argument("--lookups", type=int, default=2000, metavar="N", help="timed lookups")
    command.add_argument("--puts", type=int, default=200, metavar="N", help="timed puts and deletes")
    command.add_argument("--place", default=None, metavar="URL", help="empty store; default: a temporary SQLite file")
    options = command.parse_args()
    torch.set_num_threads(options.threads)
    where = machine(options.threads, "fp32")
    with tempfile.TemporaryDirectory() as folder:
        rows = run(options.place or str(Path(folder) / "store.db"), options)
    kind = "PostgreSQL" if options.place and "postgres" in options.place else "SQLite"
    report(f"store of {options.memories:,} memories, {kind}", rows, where, options.json)


if __name__ == "__main__":
    main()
