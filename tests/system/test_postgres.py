"""What `tests/test_store.py` says of SQLite holds for PostgreSQL."""

from __future__ import annotations

import pytest
from tests.store import test_store

from gradmem import GradmemError
from gradmem.store import Store
from stored import made

OF_FILES = ("the_file", "a_file", "files", "damaged_file", "makes_no_store", "environment", "changed_byte", "urls")
"""Tests of SQLite's file."""
FIXTURES = ("store", "many", "three")
globals().update(
    {
        name: value
        for name, value in vars(test_store).items()
        if name in FIXTURES or (name.startswith("test_") and not any(word in name for word in OF_FILES))
    }
)


@pytest.fixture
def place(postgres: str) -> str:
    """An empty database."""
    return postgres


def test_a_reader_makes_no_tables(postgres: str) -> None:
    with pytest.raises(GradmemError, match="no store in postgresql"):
        Store(postgres, create=False)
    with pytest.raises(GradmemError, match="no store in postgresql"):
        Store(postgres, create=False)


def test_a_newer_store_is_refused(postgres: str) -> None:
    from sqlalchemy import text

    with Store(postgres) as store, store._engine.begin() as connection:
        connection.execute(text("UPDATE gradmem_schema SET version = 3"))
    with pytest.raises(GradmemError, match=r"version 3.*update gradmem"):
        Store(postgres)


def test_a_changed_byte_of_a_memory_is_found(postgres: str) -> None:
    from sqlalchemy import text

    with Store(postgres) as store:
        entry = store.put(made(1))
        with store._engine.begin() as connection:
            connection.execute(text("UPDATE gradmem_versions SET data = :data"), {"data": made(2).to_bytes()})
        with pytest.raises(GradmemError, match="does not match its checksum"):
            store.load(entry.id)
