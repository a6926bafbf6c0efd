"""Rows of many memories, made by the database itself: no file crosses the connection, and no memory is written."""

from __future__ import annotations

import hashlib
from datetime import datetime, timezone

from sqlalchemy import Connection, Engine, delete, insert, text

from gradmem.store import database as db

BEGIN = datetime(2000, 1, 1, tzinfo=timezone.utc)
NUMBERS = "WITH RECURSIVE numbers(n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM numbers WHERE n < :last)"
CREATED = {
    "postgresql": "TIMESTAMPTZ '2000-01-01 00:00:00+00' + n * INTERVAL '1 minute'",
    "sqlite": "strftime('%Y-%m-%d %H:%M:%f', '2000-01-01', n || ' minutes') || '000'",
}
MEMORIES = """
INSERT INTO gradmem_memories
(id, owner, name, content, checkpoint, model, method, pinned, version, bytes, created, updated) {numbers}
SELECT md5('' || n), '', {name}, md5('a' || n) || md5('b' || n), '{zeros}' || (n % 10), 'model-' || (n % 10),
'gradmem', false, 1, :size, {created}, {created} FROM numbers
"""
VERSIONS = """
INSERT INTO gradmem_versions (memory, number, created, precision, rows, tokens, kept, unmeasured, answers, at_risk,
loss_before, loss_after, size, sha256, data) {numbers}
SELECT md5('' || n), 1, {created}, 'float32', 1, 225, 200, 0, NULL, NULL, 3.5, 0.5, :size, :sha256, :data FROM numbers
"""
TAGS = """
INSERT INTO gradmem_tags (memory, tag, owner, created) {numbers}
SELECT md5('' || n), :tag, '', {created} FROM numbers WHERE n % :every = 0
"""
TAGGED = {"half": 2, "rare": 1000}
"""Tags, and that every so manieth memory has one."""


def identity(number: int) -> str:
    """Id of a memory."""
    return hashlib.md5(str(number).encode()).hexdigest()


def name(number: int) -> str:
    """Name of a memory."""
    return f"name-{number:08}"


def fill(engine: Engine, count: int, payload: int) -> None:
    """Insert memories, numbered from the oldest on, with payloads of so many bytes."""
    data = b"p" * payload
    values = {"last": count - 1, "size": payload, "sha256": hashlib.sha256(data).hexdigest(), "data": data}
    parts = {
        "numbers": NUMBERS,
        "created": CREATED[engine.dialect.name],
        "name": "'name-' || substr('' || (100000000 + n), 2)",
        "zeros": "0" * 63,
    }
    with engine.connect().execution_options(**{db.WRITER: ""}) as connection, connection.begin():
        again = prepare(connection)
        connection.execute(text(MEMORIES.format(**parts)), values)
        connection.execute(text(VERSIONS.format(**parts)), values)
        for tag, every in TAGGED.items():
            connection.execute(text(TAGS.format(**parts)), {**values, "tag": tag, "every": every})
        connection.execute(delete(db.owners).where(db.owners.c.owner == ""))
        connection.execute(insert(db.owners).values(owner="", memories=count, bytes=count * payload))
        for statement in again:
            connection.execute(text(statement))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE" if engine.dialect.name == "postgresql" else "PRAGMA wal_checkpoint"))


def prepare(connection: Connection) -> list[str]:
    """Drop indexes and keys of the empty tables, and return the statements that make them again."""
    if connection.dialect.name == "sqlite":
        connection.execute(text("PRAGMA cache_size = -500000"))  # 500 MB: ids are in no order
        connection.connection.driver_connection.create_function("md5", 1, identity)  # type: ignore[union-attr]
        return []
    connection.execute(text("SET LOCAL maintenance_work_mem = '512MB'"))
    keys = connection.execute(
        text(
            "SELECT conrelid::regclass::text, quote_ident(conname), pg_get_constraintdef(oid) FROM pg_constraint "
            "WHERE conrelid::regclass::text LIKE 'gradmem\\_%' ORDER BY contype = 'f'"
        )
    ).all()
    indexes = connection.execute(
        text(
            "SELECT indexrelid::regclass::text, pg_get_indexdef(indexrelid) FROM pg_index "
            "WHERE indrelid::regclass::text LIKE 'gradmem\\_%' "
            "AND NOT EXISTS (SELECT FROM pg_constraint WHERE conindid = indexrelid)"
        )
    ).all()
    for table, key, _ in reversed(keys):
        connection.execute(text(f"ALTER TABLE {table} DROP CONSTRAINT {key}"))
    for index, _ in indexes:
        connection.execute(text(f"DROP INDEX {index}"))
    return [
        *(f"ALTER TABLE {table} ADD CONSTRAINT {key} {definition}" for table, key, definition in keys),
        *(definition for _, definition in indexes),
    ]
