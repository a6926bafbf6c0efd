"""Every change is one transaction."""

from __future__ import annotations

from contextlib import suppress

import pytest
from sqlalchemy import Connection, event
from tests.store.helpers import state

from gradmem import GradmemError, Memory
from gradmem.memory import identity
from gradmem.store import Store
from stored import made


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
