"""Large payloads outside the database: objects are there as long as their rows, and the database is the truth."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import text

from gradmem import GradmemError
from gradmem.errors import Missing
from gradmem.store import Store, upkeep
from gradmem.store.payloads import LARGE
from gradmem.store.text_files import TextFiles
from stored import large, made


@pytest.fixture
def folder(store: Store, tmp_path: Path) -> Path:
    """Where the store has its large payloads."""
    upkeep.place_payloads(store, str(tmp_path / "objects"))
    return tmp_path / "objects"


def objects(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def equal(store: Store, ref: str, seed: int, version: int | None = None) -> bool:
    return store.load(ref, version).tensors["memory"].equal(large(seed).tensors["memory"])


def test_only_large_payloads_are_objects(store: Store, folder: Path, place: str) -> None:
    assert upkeep.place_of_payloads(store) == f"file://{folder}"
    store.put(made(1), name="small")
    assert objects(folder) == []
    entry = store.put(large(2), name="large")
    (file,) = objects(folder)
    assert file.stat().st_size == entry.current.size >= LARGE
    assert file.stat().st_mode & 0o777 == 0o600
    with store._session.engine.connect() as connection:
        sizes = connection.execute(text("SELECT length(data) FROM gradmem_versions ORDER BY 1")).scalars().all()
    assert sizes == [0, len(store.read("small"))]
    with Store(place) as other:  # which is told by the database
        assert equal(other, "large", 2)
        assert other.put(other.read("large")).id == entry.id
    assert objects(folder) == [file]


def test_objects_go_with_their_memories(store: Store, folder: Path) -> None:
    store.put(large(1), name="one", tags="t")
    store.update("one", large(2))
    store.put(large(3), name="two", tags="t")
    store.put(large(4), name="three")
    assert len(objects(folder)) == 4
    assert [equal(store, "one", seed, version) for version, seed in ((1, 1), (2, 2))] == [True, True]
    assert store.diff("one", 1, 2).lost == []
    store.delete("one")
    assert len(objects(folder)) == 2
    assert store.prune(tags="t") == 1
    (last,) = objects(folder)
    assert last.read_bytes() == store.read("three")
    files = TextFiles(store)
    files.create("/a", "text")
    files.keep(files.read("/a")[0], large(5))
    assert len(objects(folder)) == 2
    files.edit("/a", str.upper)
    assert objects(folder) == [last]


def test_a_deletion_that_is_refused_removes_no_object(store: Store, folder: Path) -> None:
    store.put(large(1), name="one")
    store.pin(store.put(large(2)).id)
    with pytest.raises(GradmemError, match="is pinned"):
        store.delete("one", *(entry.id for entry in store.list() if entry.pinned))
    assert equal(store, "one", 1)


def test_a_missing_or_damaged_object_is_one_line(store: Store, folder: Path) -> None:
    entry = store.put(large(1), name="one")
    (file,) = objects(folder)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"?")
    with pytest.raises(GradmemError, match=r"memory 'one' is damaged in .*: it does not match its checksum"):
        store.read("one")
    file.unlink()
    with pytest.raises(GradmemError, match=rf"memory 'one' is damaged in .*: its payload file://{file} is missing"):
        store.read("one")
    assert store.get("one") == entry
    file.write_bytes(whole)
    assert equal(store, "one", 1)


def test_nothing_is_stored_if_the_object_cannot_be_written(store: Store, folder: Path) -> None:
    folder.rename(folder.with_name("moved"))
    folder.write_text("no folder")
    with pytest.raises(GradmemError) as refused:
        store.put(large(1), name="one")
    assert len(str(refused.value).splitlines()) == 1
    assert str(folder) in str(refused.value)
    assert store.list() == []
    store.put(made(1), name="small")
    with pytest.raises(Missing):
        store.get("one")


def test_orphans_are_removed_after_two_days(store: Store, folder: Path) -> None:
    kept = store.put(large(1))
    (file,) = objects(folder)
    old = folder / "2020-01-01"
    old.mkdir()
    moved = file.rename(old / file.name)
    with store._session.engine.begin() as connection:
        name = f"2020-01-01/{file.name}"
        connection.execute(text("UPDATE gradmem_versions SET object = :name"), {"name": name})
    orphan, fresh, foreign = (path / ("f" * 32) for path in (old, file.parent, folder / "other"))
    for path in (orphan, fresh, foreign):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"left by a process that was killed")
    assert upkeep.clean(store) == 1
    assert objects(folder) == sorted([moved, fresh, foreign])
    assert upkeep.clean(store) == 0
    assert equal(store, kept.id, 1)


def test_payloads_move_when_they_have_been_copied(store: Store, folder: Path, tmp_path: Path) -> None:
    store.put(large(1), name="one")
    with pytest.raises(GradmemError, match="is missing: copy the payloads of the store there first"):
        upkeep.place_payloads(store, str(tmp_path / "elsewhere"))
    assert equal(store, "one", 1)
    folder.rename(tmp_path / "elsewhere2")
    upkeep.place_payloads(store, str(tmp_path / "elsewhere2"))
    assert equal(store, "one", 1)


def test_other_storage(store: Store) -> None:
    """Whatever fsspec knows will do, such as its storage in memory."""
    before = store.put(large(0), name="before")
    upkeep.place_payloads(store, f"memory://bucket-{before.id}/folder")
    store.put(large(1), name="one")
    assert (equal(store, "before", 0), equal(store, "one", 1)) == (True, True)
    store.delete("one", "before")
    assert upkeep.clean(store) == 0


@pytest.mark.parametrize("url", ["nothing://bucket", "/proc/none/objects", "file:///proc/none"])
def test_a_place_that_cannot_be_written_is_refused(store: Store, url: str) -> None:
    with pytest.raises(GradmemError, match="cannot write") as refused:
        upkeep.place_payloads(store, url)
    assert len(str(refused.value).splitlines()) == 1
    assert upkeep.place_of_payloads(store) is None
