"""Stores of older versions: dumps of both databases are upgraded, and every memory is there."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, text

from gradmem import GradmemError
from gradmem.errors import QuotaExceeded
from gradmem.store import Store, migrations
from gradmem.store.database import locate, metadata
from gradmem.store.text_files import TextFiles
from gradmem.store.upkeep import upgrade
from stored import made

DUMPS = Path(__file__).parent / "dumps"
BEFORE = {
    "3": (),
    "2": ("DROP TABLE gradmem_files", "UPDATE gradmem_schema SET version = 2"),
    "1": (
        "DROP INDEX gradmem_memories_quota",
        "ALTER TABLE gradmem_memories DROP COLUMN bytes",
        *(f"ALTER TABLE gradmem_versions DROP COLUMN {name}" for name in ("unmeasured", "answers", "at_risk")),
        "DROP TABLE gradmem_files",
        "UPDATE gradmem_schema SET version = 1",
    ),
}
"""What makes older stores of one of version 3."""


@pytest.fixture(params=BEFORE)
def old(place: str, request: pytest.FixtureRequest) -> str:
    """A store of an older version.

    Of the local user it has `notes` with the versions made(0) and made(1), the first current; `pinned`, made(2), which
    is pinned; made(3), without a name; and the texts /a, with the memory made(5), and /b. Of the owner `other` it has
    `notes`, made(4) in int8.
    """
    url = locate(place)
    if url.get_backend_name() == "sqlite":
        with sqlite3.connect(place) as file:
            file.executescript((DUMPS / "version_3.sqlite.sql").read_text())
        file.close()
    engine = create_engine(url)
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.connection.cursor().execute((DUMPS / "version_3.postgresql.sql").read_text())
        for statement in BEFORE[request.param]:
            connection.execute(text(statement))
    engine.dispose()
    return place


def differences(place: str) -> list:
    """What the tables of a store differ in from those of a new one."""
    engine = create_engine(locate(place))
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": migrations.TABLE})
        found = compare_metadata(context, metadata)
    engine.dispose()
    return found


def test_every_memory_of_an_older_store_is_readable(old: str) -> None:
    assert upgrade(old) == migrations.HEAD
    assert differences(old) == []
    with Store(old, create=False) as store:
        assert {entry.name for entry in store.list()} == {"notes", "pinned", None, "/a"}
        notes = store.get("notes")
        assert (notes.tags, notes.current.number, notes.current.kept) == (("kv", "work"), 1, 6)
        assert [len(store.versions("notes")), store.get("pinned").pinned] == [2, True]
        (unnamed,) = (entry for entry in store.list() if entry.name is None)
        kept = [("notes", 1, 0), ("notes", 2, 1), ("pinned", 1, 2), (unnamed.id, 1, 3), ("/a", 1, 5)]
        for ref, version, seed in kept:
            found, wanted = store.load(ref, version), made(seed)
            assert found.receipts == wanted.receipts
            assert found.tensors["memory"].equal(wanted.tensors["memory"])
        assert store.owned_by("other").load("notes").receipts == made(4).receipts
        assert [entry.name for entry in store.list(tags="work")] == ["pinned", "notes"]


def test_the_totals_of_an_older_store_are_right(old: str, request: pytest.FixtureRequest) -> None:
    upgrade(old)
    with Store(old) as store:
        texts = TextFiles(store).sizes("")
        memories = len(store.list()) + ("/b" in texts)
        used = sum(version.size for entry in store.list() for version in store.versions(entry.id)) + sum(texts.values())
    with Store(old, max_memories=memories) as full, pytest.raises(QuotaExceeded, match=f"and {memories} are"):
        full.put(made(9))
    size = len(made(9).to_bytes())
    with Store(old, max_bytes=used + size - 1) as full, pytest.raises(QuotaExceeded, match=f"and {used:,} are"):
        full.put(made(9))
    with Store(old, max_memories=memories + 1, max_bytes=used + size) as room:
        room.put(made(9))


def test_a_server_is_upgraded_by_a_command_and_a_file_when_it_is_opened(old: str) -> None:
    if old.startswith("postgresql"):
        with pytest.raises(GradmemError, match="run `gradmem store upgrade`"):
            Store(old)
    else:
        Store(old).close()
        assert differences(old) == []
    for _ in range(2):  # a second time it changes nothing
        upgrade(old)
    with Store(old) as store:
        assert store.get("notes")


def test_new_tables_are_those_of_an_upgraded_store(store: Store, place: str) -> None:
    assert differences(place) == []


def test_the_last_change_is_the_version_of_new_tables() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    assert ScriptDirectory.from_config(config).get_heads() == [migrations.HEAD]
