"""Versions of a memory, and differences between them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gradmem import GradmemError, Memory
from gradmem.store import Store
from stored import made


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
