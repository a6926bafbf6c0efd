"""The SQLite file: its location, its mode, and damage."""

from __future__ import annotations

import os
import random
import sqlite3
from pathlib import Path

import pytest

from gradmem import GradmemError
from gradmem.store import Store
from stored import made


def test_a_reader_makes_no_store(place: str) -> None:
    with pytest.raises(GradmemError, match="no store at"):
        Store(place, create=False)
    assert not Path(place).exists()


def test_the_environment_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADMEM_STORE", str(tmp_path / "new" / "mine.db"))
    Store().put(made(1), name="notes")
    assert Store(f"sqlite:///{tmp_path}/new/mine.db").get("notes")


@pytest.mark.parametrize("mode", [None, 0o644, 0o660])
def test_only_its_user_reads_the_file(tmp_path: Path, mode: int | None) -> None:
    """One that was open to everybody is closed, and one that was opened to a group stays so."""
    file = tmp_path / "new" / "store.db"
    umask = os.umask(0)
    try:
        if mode is not None:
            Store(file).close()
            file.chmod(mode)
        with Store(file) as store:
            store.put(made(1))
            beside = sorted(path.name for path in file.parent.iterdir())
            modes = {path.stat().st_mode & 0o777 for path in file.parent.iterdir()}
    finally:
        os.umask(umask)
    assert beside == ["store.db", "store.db-shm", "store.db-wal"]
    assert modes == {0o660 if mode == 0o660 else 0o600}
    assert file.parent.stat().st_mode & 0o777 == 0o700


def test_a_file_that_is_no_store_keeps_its_mode(tmp_path: Path) -> None:
    file = tmp_path / "text.db"
    file.write_text("hello, this is no database" * 100)
    file.chmod(0o644)
    with pytest.raises(GradmemError):
        Store(file)
    assert file.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://root:secret@host/db", "SQLite file or PostgreSQL"),
        ("sqlite://", "SQLite file"),
        ("://", "URL of a store"),
        ("postgresql://nobody:secret@127.0.0.1:1/none", "cannot use the store postgresql"),
    ],
)
def test_bad_urls(url: str, message: str) -> None:
    with pytest.raises(GradmemError, match=message) as refused:
        Store(url)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("how", ["text", "foreign", "newer", "folder", "no version"])
def test_files_that_are_no_store(tmp_path: Path, how: str) -> None:
    file = tmp_path / "store.db"
    messages = {"foreign": "another program", "newer": "version 99.*update gradmem", "no version": "damaged"}
    if how == "text":
        file.write_text("hello, this is no database" * 100)
    elif how == "folder":
        file.mkdir()
    else:
        if how != "foreign":
            Store(file).close()
        with sqlite3.connect(file) as connection:
            change = {
                "foreign": "CREATE TABLE theirs (x)",
                "newer": "UPDATE gradmem_schema SET version_num = 99",
                "no version": "DELETE FROM gradmem_schema",
            }
            connection.execute(change[how])
        connection.close()
    with pytest.raises(GradmemError, match=messages.get(how, "cannot use the store")) as refused:
        Store(file)
    assert len(str(refused.value).splitlines()) == 1


def test_a_changed_byte_of_a_memory_is_found(store: Store, place: str) -> None:
    entry = store.put(made(1))
    with sqlite3.connect(place) as connection:
        connection.execute("UPDATE gradmem_versions SET data = ?", (made(2).to_bytes(),))
    with pytest.raises(GradmemError, match="does not match its checksum"):
        store.load(entry.id)


def test_a_damaged_file_never_gives_wrong_memories(place: str) -> None:
    """Bytes changed anywhere: every memory comes back as it was, or an error in one line says why not."""
    with Store(place) as store:
        ids = {store.put(made(seed), name=f"m{seed}", tags="t").id: seed for seed in range(12)}
    whole, draw = Path(place).read_bytes(), random.Random(0)
    errors: list[str] = []
    for _ in range(40):
        data = bytearray(whole)
        for _ in range(10):
            data[draw.randrange(len(data))] = draw.randrange(256)
        Path(place).write_bytes(data)
        for file in (f"{place}-wal", f"{place}-shm"):
            Path(file).unlink(missing_ok=True)
        try:
            with Store(place) as store:
                for one in ids:
                    assert store.load(one).receipts == made(ids[one]).receipts
                store.list(tags="t")
        except GradmemError as error:
            errors.append(str(error))
    assert errors
    assert all(len(error.splitlines()) == 1 for error in errors)
