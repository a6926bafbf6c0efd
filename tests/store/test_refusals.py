"""Every refusal is one line."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta, timezone

import pytest
import torch

from gradmem import GradmemError, Memory
from gradmem.errors import Missing
from gradmem.store import Store
from stored import made

EAST, WEST = (timezone(timedelta(hours=hours)) for hours in (14, -12))


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
