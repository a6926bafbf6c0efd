"""Listings: filters and pages."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest
from sqlalchemy import Select, func, select, text
from tests.store.helpers import names

from gradmem.errors import GradmemError
from gradmem.store import Store
from stored import made


@pytest.mark.parametrize(
    ("filters", "wanted"),
    [
        ({}, "876543210"),
        ({"checkpoint": "d" * 64}, "7531"),
        ({"checkpoint": "model-c"}, "86420"),
        ({"checkpoint": "model"}, ""),
        ({"name": "m3"}, "3"),
        ({"name": "m*"}, "012345678"),
        ({"name": "m*", "tags": "third"}, "036"),
        ({"name": "m*", "tags": "third", "checkpoint": "model-c"}, "06"),
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


def test_pages_by_name_go_on_after_a_name_that_is_gone(many: Store) -> None:
    """Names are in the order of their characters, whatever these are."""
    for seed, name in enumerate(("m3 é_%25", "m3_", "m33"), 10):
        many.put(made(seed), name=name)
    wanted = ["m0", "m1", "m2", "m3", "m3 é_%25", "m33", "m3_", "m4", "m5", "m6", "m7", "m8"]
    found, after = [], None
    while page := many.list(name="m*", limit=1, after=after):
        found, after = found + names(page), page[-1].cursor
        many.rename(page[-1].id, None)
    assert found == wanted


def test_few_and_many_memories_of_a_filter_are_listed_alike(many: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where few match one of several filters, the others are looked up for those."""
    cases = [
        {"tags": "third,six"},
        {"tags": "third", "checkpoint": "model-c"},
        {"tags": "third", "name": "m*"},
        {"tags": "third", "name": "m3"},
        {"checkpoint": "model-d", "name": "m*"},
        {"tags": "third,none", "checkpoint": "model-c", "name": "m*"},
    ]
    for filters in cases:
        pages = []
        for few in (1000, 0):
            monkeypatch.setattr("gradmem.store.listing.FEW", few)
            first = many.list(limit=1, **filters)
            rest = many.list(after=first[-1].cursor, **filters) if first else []
            pages.append(names([*first, *rest]))
        assert pages[0] == pages[1]
    assert pages[0] == []


def test_memories_of_one_moment_are_each_listed_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    moment = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
    monkeypatch.setattr("gradmem.store.transaction.now", lambda: moment)
    ids = [store.put(made(seed), tags="t").id for seed in range(7)]
    for filters in ({}, {"tags": "t"}):
        found, after = [], None
        while page := store.list(limit=2, after=after, **filters):
            found, after = found + [entry.id for entry in page], page[-1].cursor
        assert found == sorted(ids, reverse=True)


def test_filters_that_take_too_long_are_stopped(many: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit holds for the queries of a page alone."""

    def count(numbers: str) -> Select[tuple[int]]:
        return select(func.count()).select_from(text(f"(WITH RECURSIVE n(i) AS ({numbers}) SELECT i FROM n) x"))

    with monkeypatch.context() as patch:
        patch.setattr("gradmem.store.listing.SECONDS", 0.1)
        patch.setattr("gradmem.store.store.matching", lambda *_: count("SELECT 1 UNION ALL SELECT i FROM n"))
        with pytest.raises(GradmemError, match="narrow them down by since and until"):
            many.list(tags="third", checkpoint="model-c")
    with many._session.transaction() as transaction:
        longer = count("SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000000")
        assert transaction.connection.scalar(longer) == 1_000_000
    assert len(many.list()) == 9
