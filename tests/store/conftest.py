"""Stores that several tests use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gradmem.store import Store
from stored import made


@pytest.fixture
def place(tmp_path: Path) -> str:
    """Where an empty store may be made."""
    return str(tmp_path / "store.db")


@pytest.fixture
def store(place: str) -> Iterator[Store]:
    """An empty store."""
    with Store(place) as made_here:
        yield made_here


@pytest.fixture
def many(store: Store) -> Store:
    """Memories m0 to m8: every other one by checkpoint d, every third one tagged `third`, m6 tagged `six` too."""
    for seed in range(9):
        tags = ["third"] * (seed % 3 == 0) + ["six"] * (seed == 6)
        store.put(made(seed, checkpoint="cd"[seed % 2]), name=f"m{seed}", tags=tags)
    return store


@pytest.fixture
def three(store: Store) -> Store:
    """Memories `notes`, with two versions of which the first is current, `other` and `third`, with one each."""
    store.put(made(0), name="notes", tags="t")
    store.update("notes", made(1))
    store.rollback("notes", 1)
    store.put(made(2), name="other")
    store.put(made(3), name="third")
    return store
