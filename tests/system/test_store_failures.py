"""What a store loses when its server is killed or the disk of its payloads is full: nothing that was acknowledged."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from glob import glob
from pathlib import Path

import pytest
from test_kill import acknowledge, everything, lines, start

from gradmem.errors import GradmemError
from gradmem.store import Store, upkeep
from stored import large, made

WRITERS = 4
POSTGRES = sorted(glob("/usr/lib/postgresql/*/bin"), reverse=True)
FULL = """
import sys
from pathlib import Path
from gradmem.errors import GradmemError
from gradmem.store import Store, upkeep
from stored import large
place, folder = sys.argv[1:]
with Store(place) as store:
    upkeep.place_payloads(store, folder)
    stored = []
    try:
        for seed in range(100):
            stored.append(store.put(large(seed), name=f"n{seed}").id)
    except GradmemError as error:
        print(error)
    same = [store.load(id).receipts == large(seed).receipts for seed, id in enumerate(stored)]
    print(len(stored) > 3, all(same), [entry.id for entry in store.list()] == stored[::-1])
    print(len([path for path in Path(folder).rglob("*") if path.is_file()]) == len(stored))
    store.delete(stored[0])
    print(store.put(large(200)).id not in stored)
"""


def kill_server(folder: Path) -> None:
    """Kill all processes of a server at once."""
    server = int((folder / "data" / "postmaster.pid").read_text().split()[0])
    children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    for process in (server, *map(int, children)):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    patience = time.monotonic() + 30
    while Path(f"/proc/{server}").exists() and time.monotonic() < patience:
        time.sleep(0.05)


def put_until_killed(place: str, log: Path, seed: int) -> None:
    """Put memories, small and large ones, each until it is acknowledged."""
    store = None
    for number in range(seed * 10**6, (seed + 1) * 10**6):
        while True:
            try:
                store = store or Store(place)
                id = store.put((large if number % 3 == 0 else made)(number), name=f"n{number}").id
                acknowledge(log, number, id)
                break
            except GradmemError:
                time.sleep(0.1)


def wait(log: Path, count: int) -> None:
    """Wait until so many more memories have been acknowledged."""
    count, patience = len(lines(log)) + count, time.monotonic() + 60
    while len(lines(log)) < count and time.monotonic() < patience:
        time.sleep(0.05)
    assert len(lines(log)) >= count


def test_a_server_that_is_killed_while_many_write_loses_nothing(
    postgres: str, postgres_server: Path, crash: Callable[[], None], tmp_path: Path
) -> None:
    """Those who write try again until it is back, and nothing is there twice."""
    log = tmp_path / "log"
    with Store(postgres) as store:
        upkeep.place_payloads(store, str(tmp_path / "objects"))
    writers = start(put_until_killed, postgres, log, seeds=range(WRITERS))
    try:
        for _ in range(2):
            wait(log, 20)
            kill_server(postgres_server)
            crash()  # starts it again
        wait(log, 20)
    finally:
        for writer in writers:
            os.kill(writer.pid or 0, signal.SIGKILL)
            writer.join()
    with Store(postgres) as store:
        for number, id in lines(log):
            assert store.load(id).receipts == made(int(number)).receipts
        listed = everything(store)
        names = [entry.name for entry in listed]
        assert len(set(names)) == len(names)
        assert {id for _, id in lines(log)} <= {entry.id for entry in listed}
        assert len(listed) <= len(lines(log)) + WRITERS  # of each writer, one may be there that it does not know of
        for entry in listed:
            store.read(entry.id)


def test_a_full_disk_for_payloads_is_one_line_and_loses_nothing(database: str, tmp_path: Path) -> None:
    folder = tmp_path / "full"
    folder.mkdir()
    root = ["--map-root-user"] if os.geteuid() else []
    own = ["unshare", *root, "--mount", "sh", "-c"]
    mounted = f"mount -t tmpfs -o size=1m none {folder}"
    if not shutil.which("unshare") or subprocess.run([*own, mounted], capture_output=True, check=False).returncode:
        pytest.skip("a small disk cannot be mounted here")
    command = [*own, mounted + ' && exec "$@"', "sh", sys.executable, "-c", FULL, database, str(folder)]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    run = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    error, *told = run.stdout.splitlines()
    assert f"{folder}" in error
    assert "No space left on device" in error
    assert told == ["True True True", "True", "True"]


def filled(place: str, folder: Path) -> dict[str, bytes]:
    """A store with small and large memories, two versions of one; return the bytes of all."""
    with Store(place) as store:
        upkeep.place_payloads(store, str(folder))
        for seed in range(6):
            store.put((large if seed % 2 else made)(seed), name=f"n{seed}", tags="t")
        store.update("n1", made(9))
        return {f"{entry.id} {entry.name}": store.read(entry.id, 1) for entry in store.list()}


def restored(place: str, folder: Path) -> dict[str, bytes]:
    """The same of a store whose payloads have been copied."""
    with Store(place, create=False) as store:
        upkeep.place_payloads(store, str(folder))
        assert store.get("n1").current.number == 2
        assert len(store.list(tags="t")) == len(store.list())
        return {f"{entry.id} {entry.name}": store.read(entry.id, 1) for entry in store.list()}


@pytest.mark.parametrize("way", ["backup", "vacuum"])
def test_a_file_is_backed_up_while_it_is_open(way: str, tmp_path: Path) -> None:
    place, copy = tmp_path / "store.db", tmp_path / "copy.db"
    wanted = filled(str(place), tmp_path / "objects")
    with Store(place) as store:
        with sqlite3.connect(place) as source:
            if way == "vacuum":
                source.execute("VACUUM INTO ?", (str(copy),))
            else:
                with sqlite3.connect(copy) as target:
                    source.backup(target)
                target.close()
        source.close()
        shutil.copytree(tmp_path / "objects", tmp_path / "objects copy")
        store.put(large(10), name="later")
    shutil.rmtree(tmp_path / "objects")
    assert restored(str(copy), tmp_path / "objects copy") == wanted


def test_a_database_is_dumped_and_restored(postgres: str, postgres_server: Path, tmp_path: Path) -> None:
    def program(name: str) -> str:
        return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *POSTGRES])) or name

    wanted = filled(postgres, tmp_path / "objects")
    dump, other = tmp_path / "store.dump", f"restored_{os.getpid()}"
    reach = ["--host", str(postgres_server), "--username", "gradmem"]
    at = postgres.replace("postgresql://gradmem@/", "").partition("?")[0]
    subprocess.run([program("pg_dump"), *reach, "--format", "custom", "--file", dump, at], check=True)
    shutil.copytree(tmp_path / "objects", tmp_path / "copy")
    with Store(postgres) as store:
        store.delete(*(entry.id for entry in store.list()))
    assert not list((tmp_path / "objects").rglob("*/*"))
    subprocess.run([program("createdb"), *reach, other], check=True)
    subprocess.run([program("pg_restore"), *reach, "--exit-on-error", "--dbname", other, dump], check=True)
    place = postgres.replace(at, other)
    assert restored(place, tmp_path / "copy") == wanted
    with Store(place) as store:  # keys and indexes are there too
        assert store.put(made(0)).name == "n0"
        with pytest.raises(GradmemError, match="is taken"):
            store.put(made(99), name="n0")
