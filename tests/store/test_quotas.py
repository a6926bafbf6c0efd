"""Quotas of memories, bytes and tags."""

from __future__ import annotations

import threading

import pytest
from tests.store.helpers import names, state

from gradmem import GradmemError
from gradmem.errors import Missing, QuotaExceeded
from gradmem.memory import identity
from gradmem.store import Store
from stored import made


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
