"""The store: what is kept, found, changed and refused. `tests/system` runs the same on PostgreSQL."""

from __future__ import annotations

import os
import random
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import torch
from sqlalchemy import Connection, event, text

from gradmem import GradmemError, Memory, MemoryModel
from gradmem.errors import Missing, QuotaExceeded
from gradmem.memory import identity
from gradmem.store import Store
from stored import made

EAST, WEST = (timezone(timedelta(hours=hours)) for hours in (14, -12))
TEXT = "a7:Qz\nk2:9f"


@pytest.fixture
def place(tmp_path: Path) -> str:
    """Where an empty store may be made."""
    return str(tmp_path / "store.db")


@pytest.fixture
def store(place: str) -> Iterator[Store]:
    """An empty store."""
    with Store(place) as made_here:
        yield made_here


def names(entries) -> list[str | None]:
    return [entry.name for entry in entries]


# Keeping and reading


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


# Listing


@pytest.fixture
def many(store: Store) -> Store:
    """Memories m0 to m8: every other one by checkpoint d, every third one tagged `third`, m6 tagged `six` too."""
    for seed in range(9):
        tags = ["third"] * (seed % 3 == 0) + ["six"] * (seed == 6)
        store.put(made(seed, checkpoint="cd"[seed % 2]), name=f"m{seed}", tags=tags)
    return store


@pytest.mark.parametrize(
    ("filters", "wanted"),
    [
        ({}, "876543210"),
        ({"checkpoint": "d" * 64}, "7531"),
        ({"checkpoint": "model-c"}, "86420"),
        ({"checkpoint": "model"}, ""),
        ({"name": "m3"}, "3"),
        ({"name": "m*"}, "876543210"),
        ({"name": "n*"}, ""),
        ({"name": "m"}, ""),
        ({"tags": "third"}, "630"),
        ({"tags": ["six", "third"]}, "6"),
        ({"tags": "six,none"}, ""),
        ({"tags": "third", "checkpoint": "model-c"}, "60"),
        ({"tags": "third", "name": "m3"}, "3"),
    ],
)
def test_filters(many: Store, filters: dict, wanted: str) -> None:
    assert "".join(entry.name[1] for entry in many.list(**filters)) == wanted
    pages, after = "", None
    while page := many.list(**filters, limit=2, after=after):
        assert len(page) <= 2
        pages, after = pages + "".join(entry.name[1] for entry in page), page[-1].cursor
    assert pages == wanted


@pytest.mark.parametrize("tags", ["", "third"])
def test_filter_by_time(many: Store, tags: str) -> None:
    moment = many.get("m3").created
    assert names(many.list(since=moment, tags=tags))[-1] == "m3"
    assert names(many.list(until=moment, tags=tags))[0] == ("m0" if tags else "m2")
    east = moment.astimezone(timezone(timedelta(hours=5)))
    assert many.list(since=east) == many.list(since=moment.replace(tzinfo=None)) == many.list(since=moment)
    assert not many.list(until=datetime(2020, 1, 1))
    assert len(many.list(since=datetime(2020, 1, 1))) == 9


def test_pages_go_on_after_a_memory_that_is_gone(many: Store) -> None:
    first = many.list(limit=3)
    many.delete(first[-1].id)
    many.put(made(99), name="new")
    assert names(many.list(limit=2, after=first[-1].cursor)) == ["m5", "m4"]


def test_memories_of_one_moment_are_each_listed_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    moment = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
    monkeypatch.setattr("gradmem.store.transaction.now", lambda: moment)
    ids = [store.put(made(seed), tags="t").id for seed in range(7)]
    for filters in ({}, {"tags": "t"}):
        found, after = [], None
        while page := store.list(limit=2, after=after, **filters):
            found, after = found + [entry.id for entry in page], page[-1].cursor
        assert found == sorted(ids, reverse=True)


# Owners


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


# Changing


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


# Versions


def test_versions(store: Store) -> None:
    entry = store.put(made(1), name="notes", precision="int8")
    updated = store.update("notes", made(2))
    assert (updated.id, updated.current.number, updated.current.precision) == (entry.id, 2, "int8")
    store.update("notes", made(3), precision="float32")
    assert [(v.number, v.precision, v.loss_after) for v in store.versions("notes")] == [
        (1, "int8", 2.0),
        (2, "int8", 3.0),
        (3, "float32", 4.0),
    ]
    assert store.load("notes").receipts == made(3).receipts
    assert store.load("notes", 1).receipts == made(1).receipts
    back = store.rollback("notes", 1)
    assert back.current == entry.current
    assert store.load("notes").receipts == made(1).receipts
    assert store.update("notes", made(4)).current.number == 4
    assert [v.number for v in store.versions("notes")] == [1, 2, 3, 4]


def test_a_changed_memory_no_longer_stands_for_what_was_written(store: Store) -> None:
    entry = store.put(made(1))
    store.update(entry.id, made(2))
    assert store.put(made(1)).id != entry.id


def test_diff(store: Store) -> None:
    store.put(made(1, lost=(1, 2), tokens=4), name="notes")
    store.update("notes", made(2, lost=(0, 2, 5), tokens=6))
    diff = store.diff("notes", 1, 2)
    assert (diff.lost, diff.regained, diff.added) == ([(0, 0)], [(0, 1)], 2)
    assert (diff.before.kept, diff.after.kept) == (2, 3)
    assert store.diff("notes", 2, 1).lost == [(0, 1)]


def test_what_was_not_measured_is_neither_kept_nor_lost(store: Store) -> None:
    """A text in the same vectors, of which nobody knows any more, and one that was appended."""
    store.put(made(1, lost=(1, 2), tokens=4), name="notes")
    (first,) = made(1, lost=(1, 2), tokens=4).receipts
    more = made(2, lost=(0,), tokens=3)
    since = replace(first, measured=False)
    more.receipts = [replace(more.receipts[0], earlier=[since], answers=[0.1, 2.0])]
    version = store.update("notes", more).current
    assert (version.tokens, version.kept, version.unmeasured, version.at_risk) == (7, 2, 4, None)
    assert version.loss_after == more.receipts[0].loss_after
    diff = store.diff("notes", 1, 2)
    assert (diff.lost, diff.regained, diff.added, diff.unmeasured) == ([], [], 3, 4)
    again = replace(since, measured=True, answers=[])
    more.receipts = [replace(more.receipts[0], earlier=[again])]
    version = store.update("notes", more).current
    assert (version.kept, version.unmeasured, version.answers, version.at_risk) == (4, 0, 2, 1)
    assert store.get("notes").read(store.get("notes").to_dict()) == store.get("notes")


def test_append_is_a_version(store: Store) -> None:
    class Model:
        def bind(self, memory: Memory, what: str) -> Memory:
            return memory

        def append(self, memory: Memory, text: str) -> Memory:
            assert memory.receipts == made(1).receipts
            if text == "slow":
                store.update("notes", made(8))
            return made(2, tokens=9)

    store.put(made(1), name="notes")
    assert store.append("notes", "more", Model()).current.number == 2
    assert [v.tokens for v in store.versions("notes")] == [6, 9]
    store.rollback("notes", 1)
    with pytest.raises(GradmemError, match="changed meanwhile: version 3 is current, not 1"):
        store.append("notes", "slow", Model())
    assert store.load("notes").receipts == made(8).receipts


def test_versions_are_by_one_checkpoint(store: Store) -> None:
    store.put(made(1), name="notes")
    with pytest.raises(GradmemError, match="one checkpoint"):
        store.update("notes", made(2, checkpoint="d"))
    for version in (0, 2):
        with pytest.raises(GradmemError, match=f"no version {version} of memory 'notes'"):
            store.rollback("notes", version)
        with pytest.raises(GradmemError, match="no version"):
            store.load("notes", version)


# One transaction for each change


class AppendingModel:
    """Appends without a model."""

    def bind(self, memory: Memory, what: str) -> Memory:
        return memory

    def append(self, memory: Memory, text: str) -> Memory:
        return made(5)


OPERATIONS = {
    "roll back": lambda store: store.rollback("notes", 2),
    "change": lambda store: store.change("notes", name="new", tags="a,b", pinned=True),
    "tag": lambda store: store.tag("notes", "a,b"),
    "pin": lambda store: store.pin("notes"),
    "update": lambda store: store.update("notes", made(4)),
    "append": lambda store: store.append("notes", "more", AppendingModel()),
    "delete": lambda store: store.delete("notes"),
    "delete two": lambda store: store.delete("notes", "third"),
    "prune": lambda store: store.prune(name="notes"),
    "put": lambda store: store.put(made(6), name="sixth", tags="a,b"),
    "put what is kept": lambda store: store.put(made(3), tags="a,b"),
    "reuse": lambda store: store.reuse(identity(made(7).to_bytes()), name="seventh"),
    "diff": lambda store: store.diff("notes", 1, 2),
}


@pytest.fixture
def three(store: Store) -> Store:
    """Memories `notes`, with two versions of which the first is current, `other` and `third`, with one each."""
    store.put(made(0), name="notes", tags="t")
    store.update("notes", made(1))
    store.rollback("notes", 1)
    store.put(made(2), name="other")
    store.put(made(3), name="third")
    return store


def state(store: Store) -> dict:
    """All that a store says."""
    return {entry.id: (entry, tuple(store.versions(entry.id))) for entry in store.list()}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("turn", [2, 3])
def test_an_operation_is_about_one_memory_while_names_move(
    operation: str, turn: int, three: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process gives the name to another memory before a second, or a third, transaction of the operation."""
    before, ids = state(three), {entry.name: entry.id for entry in three.list()}
    elsewhere, connect, begun = Store(three._session.url.render_as_string(False)), three._session.engine.connect, []

    def connect_late() -> Connection:
        begun.append(1)
        if len(begun) == turn:
            elsewhere.rename(ids["notes"], "moved")
            elsewhere.rename(ids["other"], "notes")
        return connect()

    with monkeypatch.context() as patched, suppress(GradmemError):
        patched.setattr(three._session.engine, "connect", connect_late)
        OPERATIONS[operation](three)
    after = state(three)
    assert ids["other"] in after, "a memory is lost"
    (entry, versions), (was, had) = after[ids["other"]], before[ids["other"]]
    assert versions == had
    assert (entry.current, entry.tags, entry.pinned) == (was.current, was.tags, was.pinned)


class Killed(BaseException):
    """What ends an operation anywhere."""


@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_is_ended_in_the_middle_has_not_happened(operation: str, three: Store) -> None:
    before, left = state(three), 0

    def end(*_: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed

    event.listen(three._session.engine, "before_cursor_execute", end)
    for statements in range(100):
        left = statements
        try:
            OPERATIONS[operation](three)
        except Killed:
            left = 10**6
            assert state(three) == before, f"ended before statement {statements}"
        else:
            break
    assert 0 < statements < 99


def test_a_change_is_all_or_nothing(three: Store) -> None:
    entry = three.change("notes", name="new", tags=["b", "a"], pinned=True)
    assert (entry.name, entry.tags, entry.pinned) == ("new", ("a", "b"), True)
    assert three.get("new") == entry
    before = state(three)
    for wrong in ({"name": "other"}, {"name": "a*"}, {"tags": ["a,b"]}):
        with pytest.raises(GradmemError):
            three.change("new", **{"name": "newer", "tags": "c", "pinned": False, **wrong})
        assert state(three) == before
    for refs in (("other", "new"), ("other", "none"), ("third", "0" * 32)):
        with pytest.raises(GradmemError, match=r"pinned|no memory"):
            three.delete(*refs)
        assert state(three) == before
    assert three.delete("other", "third", "other") == 2
    assert three.change("new", name=None).name is None
    assert three.change(entry.id) == three.get(entry.id)


# Quotas


def test_an_owner_keeps_as_many_memories_as_the_quota_says(place: str) -> None:
    with Store(place, max_memories=2) as store:
        store.put(made(1), name="one")
        store.put(made(2))
        for refused in (lambda: store.put(made(3)), lambda: store.reuse(identity(made(3).to_bytes()))):
            with pytest.raises(QuotaExceeded, match="at most 2 memories may be stored, and 2 are: delete"):
                refused()
        assert store.put(made(1), tags="t").name == "one"
        store.update("one", made(4))
        assert store.owned_by("other").put(made(3))
        store.delete("one")
        assert store.put(made(3))
        assert len(store.list()) == 2


def test_an_owner_keeps_as_many_bytes_as_the_quota_says(place: str) -> None:
    size = len(made(1).to_bytes())
    with Store(place, max_bytes=3 * size + 10) as store:
        store.put(made(1), name="one")
        store.update("one", made(2))
        store.put(made(3))
        before = state(store)
        for refused in (lambda: store.put(made(4)), lambda: store.update("one", made(4))):
            with pytest.raises(QuotaExceeded, match=f"at most {3 * size + 10:,} bytes .* do not fit: delete"):
                refused()
        assert state(store) == before
        store.rollback("one", 1)
        assert store.owned_by("other").put(made(4))
        store.delete("one")
        store.put(made(4))
    for wrong in ({"max_bytes": 0}, {"max_memories": -1}):
        with pytest.raises(GradmemError, match="must be above 0"):
            Store(place, **wrong)


def test_a_store_of_version_1_is_brought_up_to_date(store: Store) -> None:
    """Its tables did not say how much a memory takes, what was not measured, and which answers are at risk."""
    size, url = len(made(1).to_bytes()), store._session.url.render_as_string(False)
    store.put(made(1), name="one", tags="t")
    store.update("one", made(2))
    store.put(made(3))
    before = state(store)
    with store._session.engine.begin() as connection:
        for statement in (
            "DROP INDEX gradmem_memories_quota",
            "ALTER TABLE gradmem_memories DROP COLUMN bytes",
            *(f"ALTER TABLE gradmem_versions DROP COLUMN {name}" for name in ("unmeasured", "answers", "at_risk")),
            "UPDATE gradmem_schema SET version = 1",
        ):
            connection.execute(text(statement))
    with Store(url, create=False, max_bytes=3 * size + 10) as old:
        assert state(old) == before
        version = old.get("one").current
        assert (version.kept, version.unmeasured, version.answers, version.at_risk) == (6, 0, None, None)
        with pytest.raises(QuotaExceeded, match=f"and {3 * size:,} are"):
            old.put(made(4))
    memory = made(4)
    memory.receipts = [replace(memory.receipts[0], answers=[0.1, 2.0])]
    with Store(url) as again:
        version = again.put(memory).current
        assert (version.unmeasured, version.answers, version.at_risk) == (0, 2, 1)


def test_threads_do_not_exceed_a_quota(store: Store) -> None:
    limited, refused = Store(store._session.url.render_as_string(False), max_memories=5), []

    def fill(number: int) -> None:
        for seed in range(4):
            try:
                limited.put(made(10 * number + seed))
            except QuotaExceeded:
                refused.append(seed)

    threads = [threading.Thread(target=fill, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(store.list()), len(refused)) == (5, 11)


def test_no_memory_has_more_tags_than_a_hundred(store: Store) -> None:
    hundred = [f"t{number}" for number in range(100)]
    store.put(made(1), name="notes", tags=hundred)
    for use in (
        lambda: store.put(made(1), tags="more"),
        lambda: store.put(made(2), tags=[*hundred, "more"]),
        lambda: store.tag("notes", ",".join([*hundred, "more"])),
        lambda: store.list(tags=[*hundred, "more"]),
    ):
        with pytest.raises(GradmemError, match="number of tags must be at most 100, not 101"):
            use()
    assert len(store.get("notes").tags) == 100
    assert names(store.list(tags=hundred)) == ["notes"]


def test_no_version_has_a_number_that_no_database_takes(store: Store) -> None:
    store.put(made(1), name="notes")
    for number in (-1, 0, 2, 2**31, 2**63, 10**30):
        for look in (
            lambda number=number: store.read("notes", number),
            lambda number=number: store.rollback("notes", number),
            lambda number=number: store.diff("notes", 1, number),
        ):
            with pytest.raises(Missing, match=f"no version {number} of memory"):
                look()


# Refusals


def spoiled() -> Memory:
    """Make a memory whose write diverged."""
    memory = made(1)
    return Memory(memory.tensors, [replace(memory.receipts[0], losses=[3.0, float("nan")])])


REFUSED = {
    "empty name": lambda store: store.put(made(1), name=""),
    "name like an id": lambda store: store.put(made(1), name="0" * 32),
    "name like an option": lambda store: store.put(made(1), name="-x"),
    "name like a filter": lambda store: store.put(made(1), name="a*"),
    "name with a line end": lambda store: store.put(made(1), name="a\nb"),
    "long name": lambda store: store.put(made(1), name="a" * 201),
    "tag that does not print": lambda store: store.put(made(1), tags="a\0b"),
    "tag with a comma": lambda store: store.put(made(1), tags=["a,b"]),
    "no memory file": lambda store: store.put(b"hello"),
    "memory of bare tokens": lambda store: store.put(Memory({"memory": torch.zeros(1, 2)})),
    "loss that is no number": lambda store: store.put(spoiled()),
    "precision": lambda store: store.put(made(1), precision="int4"),
    "missing": lambda store: store.get("notes"),
    "missing with a NUL": lambda store: store.get("no\0tes"),
    "missing, not UTF-8": lambda store: store.get("no\udc80tes"),
    "filter with a NUL": lambda store: store.list(name="no\0tes*"),
    "filter, not UTF-8": lambda store: store.list(checkpoint="k\udc80v"),
    "limit": lambda store: store.list(limit=0),
    "many": lambda store: store.list(limit=10**6),
    "cursor": lambda store: store.list(after="x"),
    "cursor with a NUL": lambda store: store.list(after="20260101T000000.000000_\0"),
    "owner": lambda store: store.owned_by(""),
    "a time before all times": lambda store: store.list(since=datetime.min.replace(tzinfo=EAST)),
    "a time after all times": lambda store: store.list(until=datetime.max.replace(tzinfo=WEST), tags="t"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case: str, store: Store) -> None:
    with pytest.raises(GradmemError) as refused:
        REFUSED[case](store)
    assert len(str(refused.value).splitlines()) == 1
    assert "gradmem_" not in str(refused.value)  # no table of the database
    assert not store.list()


def test_a_name_that_cannot_be_is_missing(store: Store) -> None:
    """Also where the database would refuse the string itself."""
    for name in ("no\0tes", "no\udc80tes"):
        for look in (store.get, store.load, store.versions, store.delete, store.pin):
            with pytest.raises(Missing, match="no memory 'no"):
                look(name)


# The file


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
                "newer": "UPDATE gradmem_schema SET version = 99",
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
