"""Eight processes write to one store, and are killed at random moments."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.context import ForkProcess
from pathlib import Path

from gradmem.errors import GradmemError, QuotaExceeded
from gradmem.store import Store
from stored import made

PROCESSES = 8
ROUNDS = 4
DONE = 50
"""What all together have acknowledged in a round before they are killed."""
# Forked: what tests have imported need not be imported again. No connection is open when processes start.
fork = multiprocessing.get_context("fork")


def acknowledge(file: Path, *words: object) -> None:
    """Append a line, in one system call: a line is there or it is not."""
    with open(file, "ab", buffering=0) as log:
        log.write((" ".join(map(str, words)) + "\n").encode())


def write_for_ever(place: str, log: Path, seed: int) -> None:
    """Put, append versions to, rename and delete memories until killed; say what has been done when it is."""
    store, draw, last = Store(place), random.Random(seed), ""
    for number in range(seed * 10**6, (seed + 1) * 10**6):
        kind = draw.random()
        if kind < 0.6 or not last:
            last = store.put(made(number), name=f"n{number}", tags=f"process{seed % PROCESSES},all").id
            acknowledge(log, "put", last, number, 1)
        elif kind < 0.7:
            # Name and tags change together or not at all.
            store.change(last, name=f"m{number}", tags=f"process{seed % PROCESSES},m{number},all")
        elif kind < 0.8:
            version = store.update(last, made(number)).current.number
            acknowledge(log, "put", last, number, version)
        else:
            # What was killed in deleting may be gone or not: both are right.
            acknowledge(log, "deleting", last)
            store.delete(last)
            acknowledge(log, "deleted", last)
            last = ""


def start(target: Callable[..., None], *arguments: object, seeds: range = range(PROCESSES)) -> list[ForkProcess]:
    """Start processes, each with a seed of its own."""
    started = [fork.Process(target=target, args=(*arguments, seed)) for seed in seeds]
    for process in started:
        process.start()
    return started


def lines(log: Path) -> list[list[str]]:
    """Words of the lines that have been acknowledged."""
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def everything(store: Store, **filters: str) -> list:
    """All pages of a listing."""
    found, after = [], None
    while page := store.list(limit=100, after=after, **filters):
        found, after = [*found, *page], page[-1].cursor
    return found


def test_nothing_acknowledged_is_lost_and_nothing_half_written_is_listed(database: str, tmp_path: Path) -> None:
    draw, log = random.Random(0), tmp_path / "log"
    for turn in range(ROUNDS):
        before, patience = len(lines(log)), time.monotonic() + 60
        writers = start(write_for_ever, database, log, seeds=range(turn * PROCESSES, (turn + 1) * PROCESSES))
        while len(lines(log)) < before + DONE and time.monotonic() < patience:
            time.sleep(0.05)
        for writer in draw.sample(writers, len(writers)):
            time.sleep(draw.random() * 0.1)
            os.kill(writer.pid or 0, signal.SIGKILL)
        for writer in writers:
            writer.join()
            assert writer.exitcode == -signal.SIGKILL
    told = lines(log)
    gone = {words[1] for words in told if words[0] == "deleted"}
    unsure = {words[1] for words in told if words[0] == "deleting"}
    kept = [(words[1], int(words[2]), int(words[3])) for words in told if words[0] == "put" and words[1] not in unsure]
    assert len(kept) > DONE
    assert gone
    with Store(database) as store:
        for one, number, version in kept:
            assert store.load(one, version).receipts == made(number).receipts
        listed = everything(store)
        for entry in listed:
            assert len(store.load(entry.id)) == 1
            assert [version.number for version in store.versions(entry.id)] == list(range(1, entry.current.number + 1))
            assert [tag for tag in entry.tags if tag[0] == "m"] == [entry.name] * (entry.name[0] == "m")
        assert {one for one, _, _ in kept} <= {entry.id for entry in listed}
        assert not gone & {entry.id for entry in listed}
        assert [entry.id for entry in everything(store, tags="all")] == [entry.id for entry in listed]


def put_shared(place: str, log: Path, seed: int) -> None:
    """Put the same twenty memories as everybody, in an order of one's own."""
    store = Store(place)
    for number in random.Random(seed).sample(range(20), 20):
        acknowledge(log, number, store.put(made(number), name=f"n{number}", tags=f"process{seed}").id)


def test_processes_that_put_the_same_get_the_same(database: str, tmp_path: Path) -> None:
    """They make the tables together too."""
    log = tmp_path / "log"
    for process in start(put_shared, database, log):
        process.join()
        assert process.exitcode == 0
    told = lines(log)
    assert len(told) == 20 * PROCESSES
    assert len({tuple(words) for words in told}) == 20
    with Store(database) as store:
        assert sorted(entry.name for entry in store.list()) == sorted(f"n{number}" for number in range(20))
        assert all(len(entry.tags) == PROCESSES for entry in store.list())


def update_shared(place: str, log: Path, seed: int) -> None:
    """Add ten versions to the one memory."""
    with Store(place) as store:
        for number in range(10):
            acknowledge(log, store.update("shared", made(100 * seed + number)).current.number)


def test_versions_of_many_processes_are_all_kept(database: str, tmp_path: Path) -> None:
    with Store(database) as store:
        store.put(made(10**6), name="shared")
    for process in start(update_shared, database, tmp_path / "log"):
        process.join()
        assert process.exitcode == 0
    with Store(database) as store:
        assert len(store.versions("shared")) == 1 + 10 * PROCESSES
        assert store.get("shared").tags == ()


def move_names(place: str, log: Path, seed: int) -> None:
    """Give the name to the memory of two versions and take it away, while others roll it back and change it."""
    store = Store(place)
    several, single = (entry.id for entry in reversed(store.list()))
    for number in range(40):
        with suppress(GradmemError):
            if seed == 0:
                store.rename(several, None)
                store.rename(single, "notes")
                store.rename(single, None)
                store.rename(several, "notes")
            elif seed == 1:
                store.change("notes", tags=f"t{number}", pinned=True)
            else:
                store.rollback("notes", 1 + number % 2)


def test_names_that_move_lose_no_memory(database: str, tmp_path: Path) -> None:
    with Store(database) as store:
        store.put(made(1), name="notes")
        store.update("notes", made(2))
        store.put(made(3))
    for process in start(move_names, database, tmp_path / "log", seeds=range(4)):
        process.join()
        assert process.exitcode == 0
    with Store(database) as store:
        single, several = store.list()
        assert store.load(single.id).receipts == made(3).receipts
        assert store.load(several.id).receipts == made(several.current.number).receipts


def fill(place: str, log: Path, seed: int) -> None:
    """Put memories until there may be no more."""
    with Store(place, max_memories=20) as store:
        for number in range(10):
            try:
                acknowledge(log, store.put(made(100 * seed + number)).id)
            except QuotaExceeded:
                continue


def test_processes_do_not_exceed_a_quota_together(database: str, tmp_path: Path) -> None:
    for process in start(fill, database, tmp_path / "log"):
        process.join()
        assert process.exitcode == 0
    with Store(database) as store:
        assert sorted([entry.id] for entry in store.list()) == sorted(lines(tmp_path / "log"))
        assert len(store.list()) == 20


def test_a_server_that_crashes_loses_nothing(postgres: str, crash: Callable[[], None]) -> None:
    """A store that is open goes on when the server is back."""
    with Store(postgres) as store:
        ids = [store.put(made(seed)).id for seed in range(20)]
        crash()
        assert [store.load(one).receipts for one in ids] == [made(seed).receipts for seed in range(20)]
        assert {entry.id for entry in store.list()} == set(ids)
