"""A store with many memories: lookup by id and name, listing by each filter, and puts one by one.

The memories are as large as those of `kv-32` (8 vectors of width 128, receipt of 225 tokens) and are inserted in bulk.
Of all, a tenth is of each of ten checkpoints, half have the tag `half`, every thousandth the tag `rare`, and one was
created every minute. A listing is of one page of 50. Timed from Python, with the first calls, which open connections,
left out. On a machine that does other work the clock measures that too. The processor time of this process does not: it
is what SQLite takes, but not what a server takes. With --place the store must be empty; by default it is a SQLite file
in a temporary folder.
"""

from __future__ import annotations

import secrets
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from sqlalchemy import insert

from benchmarks.common import Row, machine, measure, parser, report
from gradmem import Memory, Receipt
from gradmem.store import Store
from gradmem.store import database as db

BEGIN = datetime(2026, 1, 1, tzinfo=timezone.utc)
BATCH = 1000
WARM = 5
TOKENS = 225


def made(number: int) -> Memory:
    """Make a memory of the size that `kv-32` writes."""
    numbers = np.random.default_rng(number).random(TOKENS).round(3).tolist()
    about: dict[str, Any] = {"method": "gradmem", "model": "kv-32", "context_tokens": TOKENS, "steps": 5}
    about |= dict.fromkeys(("backbone", "checkpoint", "tokenizer", "context_sha256"), "0" * 64)
    about |= {"losses": numbers[:6], "token_losses": numbers, "inner_lr": [0.5] * 8}
    return Memory({"memory": torch.randn(1, 8, 128)}, [Receipt(**about)])


def fill(place: str, count: int) -> list[str]:
    """Insert memories, numbered from the oldest on; return their ids."""
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "one.db") as one:
        entry = one.put(made(0))
        version = {**vars(entry.current), "data": one.read(entry.id)}
    ids = [secrets.token_hex(16) for _ in range(count)]
    engine = db.connect(db.locate(place), create=True)
    for first in track(range(0, count, BATCH), "filling", transient=True):
        numbers = range(first, min(first + BATCH, count))
        rows = [about(ids[number], number) for number in numbers]
        tagged = [
            {"memory": row["id"], "owner": "", "created": row["created"], "tag": tag}
            for number, row in zip(numbers, rows, strict=True)
            for tag, every in (("half", 2), ("rare", 1000))
            if number % every == 0
        ]
        with engine.begin() as connection:
            connection.execute(insert(db.memories), rows)
            connection.execute(insert(db.versions), [{"memory": row["id"], **version} for row in rows])
            connection.execute(insert(db.tags), tagged)
    engine.dispose()
    return ids


def about(identity: str, number: int) -> Row:
    """Row of a memory."""
    created = BEGIN + timedelta(minutes=number)
    names = {"id": identity, "owner": "", "name": f"name-{number:06}", "content": f"{number:064x}"}
    written_by = {"checkpoint": f"{number % 10:064x}", "model": f"model-{number % 10}", "method": "gradmem"}
    return {**names, **written_by, "pinned": False, "version": 1, "created": created, "updated": created}


def job(what: str, call: Callable[[int], Any], repeats: int) -> Row:
    """Time a call with the numbers from 0 on, by the clock and by the processor time of this process."""
    times = []
    for number in range(repeats + WARM):
        started, worked = time.perf_counter(), time.process_time()
        found = call(number)
        times.append([1000 * (time.perf_counter() - started), 1000 * (time.process_time() - worked)])
    shown = len(found) if isinstance(found, list) else None
    (p50, cpu50), (p99, cpu99) = np.percentile(times[WARM:], [50, 99], axis=0).tolist()
    figures = {"p50_ms": p50, "p99_ms": p99, "cpu_p50_ms": cpu50, "cpu_p99_ms": cpu99}
    return {"operation": what, **figures, "calls": repeats, "listed": shown}


def jobs(store: Store, ids: list[str], lookups: int, repeats: int) -> list[Callable[[], Row]]:
    """Lookups of random memories, and listings."""
    drawn = np.random.default_rng(0).integers(len(ids), size=lookups + WARM).tolist()
    by: dict[str, Callable[[int], Any]] = {
        "get by id": lambda i: store.get(ids[drawn[i]]),
        "get by name": lambda i: store.get(f"name-{drawn[i]:06}"),
        "read by id (bytes, checksum)": lambda i: store.read(ids[drawn[i]]),
    }
    middle = BEGIN + timedelta(minutes=len(ids) // 2)
    [oldest] = store.list(since=BEGIN, until=BEGIN + timedelta(minutes=1))
    [in_the_middle] = store.list(since=middle, until=middle + timedelta(minutes=1))
    listings: dict[str, dict[str, Any]] = {
        "list": {},
        "list from the middle on": {"after": in_the_middle.cursor},
        "list after the last": {"after": oldest.cursor},
        "list by checkpoint": {"checkpoint": f"{3:064x}"},
        "list by model": {"checkpoint": "model-3"},
        "list by unknown checkpoint": {"checkpoint": "none"},
        "list by name": {"name": "name-000007"},
        "list by name, 100 begin so": {"name": "name-0123*"},
        "list by name, all begin so": {"name": "name-*"},
        "list by tag of half": {"tags": "half"},
        "list by tag of a thousandth": {"tags": "rare"},
        "list by both tags": {"tags": "half,rare"},
        "list by unknown tag": {"tags": "none"},
        "list by date": {"since": middle, "until": middle + timedelta(days=1)},
        "list by tag and date": {"tags": "half", "until": middle},
        "list by tag and checkpoint": {"tags": "half", "checkpoint": "model-4"},
        "list by tag and checkpoint, none": {"tags": "half", "checkpoint": "model-3"},
    }
    timed: list[Callable[[], Row]] = [partial(job, what, call, lookups) for what, call in by.items()]
    return [*timed, *(partial(job, what, partial(page, store, given), repeats) for what, given in listings.items())]


def page(store: Store, filters: dict[str, Any], _: int) -> Any:
    """One page of a listing."""
    return store.list(**filters)


def run(place: str, count: int, lookups: int, repeats: int, puts: int) -> list[Row]:
    """Fill a store and measure it."""
    with Store(place) as store:
        if store.list():
            raise SystemExit(f"{place} is not empty: it would be filled with {count:,} memories")
        ids = fill(place, count)
        rows = measure("store", jobs(store, ids, lookups, repeats))
        fresh = [made(number + 1) for number in range(puts + WARM)]
        return [*rows, job("put, on the disk", lambda i: store.put(fresh[i], tags="new"), puts)]


def main() -> None:
    """Command line."""
    command = parser(__doc__, repeats=100)
    command.add_argument("--memories", type=int, default=100_000, metavar="N", help="memories in the store")
    command.add_argument("--lookups", type=int, default=2000, metavar="N", help="timed lookups")
    command.add_argument("--puts", type=int, default=200, metavar="N", help="timed puts")
    command.add_argument("--place", default=None, metavar="URL", help="empty store; default: a temporary SQLite file")
    options = command.parse_args()
    torch.set_num_threads(options.threads)
    where = machine(options.threads, "fp32")
    sizes = (options.memories, options.lookups, options.repeats, options.puts)
    with tempfile.TemporaryDirectory() as folder:
        rows = run(options.place or str(Path(folder) / "store.db"), *sizes)
    kind = "PostgreSQL" if options.place and "postgres" in options.place else "SQLite"
    report(f"store of {options.memories:,} memories, {kind}", rows, where, options.json)


if __name__ == "__main__":
    main()
