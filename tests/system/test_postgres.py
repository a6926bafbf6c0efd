"""The tests in `tests/store` hold for PostgreSQL too, except those of the SQLite file."""

from __future__ import annotations

import pytest
from tests.store import (
    conftest,
    test_listing,
    test_migrations,
    test_quotas,
    test_refusals,
    test_store,
    test_transactions,
    test_versions,
)

from gradmem import GradmemError
from gradmem.store import Store
from stored import made

MODULES = (
    test_store,
    test_listing,
    test_versions,
    test_transactions,
    test_quotas,
    test_refusals,
    test_migrations,
)
FIXTURES = ("store", "many", "three")
globals().update({name: getattr(conftest, name) for name in FIXTURES}, old=test_migrations.old)
globals().update({name: test for one in MODULES for name, test in vars(one).items() if name.startswith("test_")})


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

    with Store(postgres) as store, store._session.engine.begin() as connection:
        connection.execute(text("UPDATE gradmem_schema SET version_num = 99"))
    with pytest.raises(GradmemError, match=r"version 99.*update gradmem"):
        Store(postgres)


def test_a_changed_byte_of_a_memory_is_found(postgres: str) -> None:
    from sqlalchemy import text

    with Store(postgres) as store:
        entry = store.put(made(1))
        with store._session.engine.begin() as connection:
            connection.execute(text("UPDATE gradmem_versions SET data = :data"), {"data": made(2).to_bytes()})
        with pytest.raises(GradmemError, match="does not match its checksum"):
            store.load(entry.id)
