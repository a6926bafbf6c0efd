"""The file of API keys: many processes, private, and silent about where it is."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from gradmem.errors import GradmemError, Missing
from gradmem.serving.api_keys import ApiKeys

PROCESSES, OWNERS = 8, 6


def add_and_remove(file: Path, number: int) -> None:
    """Add keys and remove half of them; fail where one that was added is gone."""
    keys = ApiKeys(file)
    for owner in range(OWNERS):
        keys.add(f"{number}-{owner}")
    for owner in range(0, OWNERS, 2):
        keys.remove(f"{number}-{owner}")


def test_processes_that_change_the_file_take_turns(tmp_path: Path) -> None:
    file = tmp_path / "new" / "keys.json"
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=add_and_remove, args=(file, number)) for number in range(PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * PROCESSES
    wanted = {f"{number}-{owner}" for number in range(PROCESSES) for owner in range(1, OWNERS, 2)}
    assert ApiKeys(file).owners().keys() == wanted


def test_nobody_else_reads_the_file_or_what_lies_beside_it(tmp_path: Path) -> None:
    keys = ApiKeys(tmp_path / "new" / "keys.json")
    before = os.umask(0)
    try:
        keys.add("one")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o077 for path in (keys.path.parent, *keys.path.parent.iterdir())} == {0}


def test_changes_within_one_tick_of_the_clock_are_seen(tmp_path: Path) -> None:
    """A file of the same size and time, perhaps in the same place on the disk, may be another."""
    keys, server = ApiKeys(tmp_path / "keys.json"), ApiKeys(tmp_path / "keys.json")
    key = keys.add("one")
    when = keys.path.stat().st_mtime_ns
    os.utime(keys.path, ns=(when, when))
    assert server.owner(key) == "one"
    keys.remove("one")
    other = keys.add("two")
    os.utime(keys.path, ns=(when, when))
    assert (server.owner(key), server.owner(other)) == (None, "two")


DAMAGED = ["", "[]", "{", '{"one": 1}', '{"one": {"sha256": "x"}}', "[" * 100_000]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_file_is_refused_and_left_as_it_is(text: str, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text(text)
    for use in (ApiKeys(file).owners, lambda: ApiKeys(file).add("two"), lambda: ApiKeys(file).owner("gm-x")):
        with pytest.raises(GradmemError, match="damaged or not a file of keys"):
            use()
    assert file.read_text() == text
    with pytest.raises(Missing):
        ApiKeys(tmp_path / "none.json").remove("one")


def test_a_reply_does_not_say_where_the_file_is(tmp_path: Path) -> None:
    from fastapi.testclient import TestClient

    from gradmem.serving.app import create_app
    from gradmem.serving.settings import Settings
    from gradmem.store import Store

    file = tmp_path / "keys.json"
    file.write_text("{")
    app = create_app(Store(tmp_path / "store.db"), Settings(), ApiKeys(file))
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        for make in (lambda: None, file.unlink, file.mkdir):
            make()
            answer = client.get("/v1/memories", headers={"Authorization": "Bearer gm-x"})
            assert answer.status_code == (503 if file.exists() else 401)
            assert str(tmp_path) not in answer.text
            assert answer.json()["error"]["message"]


def test_keys_are_hashed_and_their_file_is_private(keys: ApiKeys) -> None:
    key = keys.add("one")
    assert key not in keys.path.read_text()
    assert keys.path.stat().st_mode & 0o077 == 0
    assert ApiKeys(keys.path).owner(key) == "one"
    with pytest.raises(GradmemError, match="has a key"):
        keys.add("one")
    with pytest.raises(GradmemError, match="an owner"):
        keys.add("../one")
