"""What a store keeps, finds and changes."""

from __future__ import annotations

import threading
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import torch
from tests.store.helpers import TEXT, names

from gradmem import GradmemError, Memory, MemoryModel
from gradmem.store import Store
from stored import made


def test_what_is_put_comes_back(store: Store, place: str) -> None:
    memory = made(1, lost=(2, 3), rows=2)
    before = datetime.now(timezone.utc)
    entry = store.put(memory, name="notes", tags="b, a,b")
    assert (entry.name, entry.tags, entry.pinned) == ("notes", ("a", "b"), False)
    assert (entry.model, entry.checkpoint, entry.method) == ("model-c", "c" * 64, "gradmem")
    assert before <= entry.created == entry.updated <= datetime.now(timezone.utc)
    assert entry.created.utcoffset() == timedelta(0)
    current = entry.current
    assert (current.number, current.rows, current.tokens, current.kept) == (1, 2, 12, 8)
    assert (current.loss_before, current.loss_after) == (3.0, 2.0)
    data = Store(place).read("notes")
    assert current.size == len(data)
    for found in (store.load(entry.id), Memory.from_bytes(data)):
        assert torch.equal(found.tensors["memory"], memory.tensors["memory"])
        assert found.receipts == memory.receipts
    assert store.get("notes") == store.get(entry.id) == entry


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_precision_is_kept_and_said(store: Store, tmp_path: Path, precision: str) -> None:
    memory = made(1)
    data = memory.save(tmp_path / "m", precision).read_bytes()
    entry = store.put(data)
    assert entry.current.precision == precision
    assert store.put(memory, precision=precision) == entry
    assert store.read(entry.id) == data
    assert torch.equal(store.load(entry.id).tensors["memory"], memory.rounded(precision).tensors["memory"])


def test_ids_are_random_and_safe_in_a_url(store: Store) -> None:
    ids = [store.put(made(seed)).id for seed in range(20)]
    assert len({one[:8] for one in ids}) == 20
    assert all(len(one) == 32 and set(one) <= set("0123456789abcdef") for one in ids)


def test_the_same_memory_is_kept_once(store: Store) -> None:
    first = store.put(made(1), tags="a")
    again = store.put(made(1), name="late", tags="b")
    assert (again.id, again.name, again.tags) == (first.id, "late", ("a", "b"))
    with pytest.raises(GradmemError, match="stored already, as 'late'"):
        store.put(made(1), name="other")
    assert store.put(made(1), precision="int8").id != first.id
    assert len(store.list()) == 2


def test_a_name_belongs_to_one_memory(store: Store) -> None:
    store.put(made(1), name="notes")
    other = store.put(made(2))
    for take in (lambda: store.put(made(3), name="notes"), lambda: store.rename(other.id, "notes")):
        with pytest.raises(GradmemError, match="'notes' is taken"):
            take()
    store.rename("notes", "old")
    assert store.rename(other.id, "notes").name == "notes"
    assert store.rename("old", None).name is None
    assert len(store.list()) == 2


def test_write_asks_the_model_once(tiny: MemoryModel, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    write = MemoryModel.write
    monkeypatch.setattr(MemoryModel, "write", lambda *given, **options: calls.append(given) or write(*given, **options))
    entry = store.write(tiny, TEXT, name="notes")
    assert torch.equal(store.load("notes").tensors["memory"], tiny.write(TEXT).tensors["memory"])
    calls.clear()
    assert store.write(tiny, TEXT, tiny.method.write_steps) == entry
    assert store.write(tiny, [TEXT], tags="a").id == entry.id
    assert not calls
    settings = [{"steps": 1}, {"until": 0.01, "max_steps": 2}, {"until": 0.02, "max_steps": 2}, {"precision": "int8"}]
    others = {store.write(tiny, TEXT, **given).id for given in settings}
    others |= {store.write(tiny, text).id for text in ("a7:Qx", ["a7:Qz", "k2:9f"])}
    others.add(store.owned_by("someone").write(tiny, TEXT).id)
    assert len(others - {entry.id}) == len(calls) == 7


def test_write_of_another_checkpoint_is_another_memory(tiny: MemoryModel, other: MemoryModel, store: Store) -> None:
    assert store.write(tiny, TEXT).id != store.write(other, TEXT).id


def test_two_that_write_the_same_get_one_memory(tiny: MemoryModel, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both find nothing, and both write: the second to finish gets what the first has kept."""
    store, meet = Store(place), threading.Barrier(2)
    memory = tiny.write(TEXT)
    monkeypatch.setattr(MemoryModel, "write", lambda *given, **options: (meet.wait(10), memory)[1])
    found = []
    threads = [threading.Thread(target=lambda: found.append(store.write(tiny, TEXT, name="both"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({entry.id for entry in found}) == len(found) - 1 == len(store.list()) == 1


def test_a_taken_name_is_refused_before_anything_is_written(
    tiny: MemoryModel, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put(made(1), name="notes")
    monkeypatch.setattr(MemoryModel, "write", lambda *given, **options: pytest.fail("written"))
    with pytest.raises(GradmemError, match="is taken"):
        store.write(tiny, TEXT, name="notes")


def test_open_answers(tiny: MemoryModel, store: Store, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path / "checkpoint")
    model = MemoryModel.from_pretrained(str(tmp_path / "checkpoint"))
    store.write(model, TEXT, name="notes")
    assert store.open("notes").ask(["a7", "k2"]) == model.write(TEXT).ask(["a7", "k2"])


def test_an_owner_sees_no_memory_of_another(store: Store) -> None:
    mine = store.put(made(1), name="notes", tags="t")
    theirs = store.owned_by("key")
    assert theirs.list() == theirs.list(tags="t") == theirs.list(name="notes") == []
    for ref in ("notes", mine.id):
        for use in (
            theirs.get,
            theirs.read,
            theirs.load,
            theirs.versions,
            theirs.delete,
            theirs.pin,
            lambda ref: theirs.rename(ref, "x"),
            lambda ref: theirs.tag(ref, "x"),
            lambda ref: theirs.update(ref, made(2)),
            lambda ref: theirs.rollback(ref, 1),
            lambda ref: theirs.diff(ref, 1, 1),
        ):
            with pytest.raises(GradmemError, match="no memory"):
                use(ref)
    assert theirs.prune() == 0
    other = theirs.put(made(1), name="notes")
    assert other.id != mine.id
    assert store.get("notes") == mine
    assert [entry.id for entry in Store(store._session.url.render_as_string(False), "key").list()] == [other.id]


def test_deleted_is_gone(store: Store, place: str) -> None:
    entry = store.put(made(1), name="notes", tags="t")
    store.update("notes", made(2))
    store.delete("notes")
    for ref in ("notes", entry.id):
        with pytest.raises(GradmemError, match=f"no memory '{ref}'"):
            store.read(ref)
    assert store.list() == store.list(tags="t") == []
    assert store.put(made(1), name="notes").id != entry.id


def test_pinned_memories_stay(many: Store) -> None:
    assert many.pin("m3").pinned
    with pytest.raises(GradmemError, match="pinned"):
        many.delete("m3")
    assert many.prune(tags="third") == 2
    assert many.prune(until=datetime(2020, 1, 1)) == 0
    assert names(many.list(tags="third")) == ["m3"]
    assert len(many.list()) == 7
    many.pin("m3", False)
    many.delete("m3")
    assert many.prune() == 6


def test_tags_and_times_change(store: Store) -> None:
    entry = store.put(made(1), name="notes", tags="a,b")
    changed = store.tag("notes", ["c", "b"])
    assert changed.tags == ("b", "c")
    assert changed.created == entry.created
    assert changed.updated > entry.updated
    assert names(store.list(tags="c")) == ["notes"]
    assert not store.list(tags="a")
