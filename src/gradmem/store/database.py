"""The tables of a store, and how a connection to SQLite or PostgreSQL keeps its promises."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import platformdirs
from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Dialect,
    Engine,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    TypeDecorator,
    UniqueConstraint,
    create_engine,
    event,
    func,
    insert,
    inspect,
    select,
    text,
    update,
)
from sqlalchemy.engine import URL, Connection, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError
from sqlalchemy.schema import CreateColumn

from ..errors import GradmemError, Missing
from ..files import close_to_others, make_private

SCHEMA = 2
"""Version of the tables. A store with a higher one was made by a newer gradmem, and is refused."""
BUSY_SECONDS = 60
"""How long a process waits for others that write to the same SQLite file."""
WRITER = "writer"
"""Execution option of a connection: the owner for whom it writes, or None where it only reads."""
_LOCK = 0x67726164
"""Key of the PostgreSQL lock under which one process makes the tables while the others wait."""


def utc(moment: datetime) -> datetime:
    """A moment in UTC; one without a time zone already is."""
    return moment.replace(tzinfo=timezone.utc) if moment.tzinfo is None else moment.astimezone(timezone.utc)


class Moment(TypeDecorator[datetime]):
    """A time in UTC. SQLite keeps no time zone, and PostgreSQL answers in that of the session."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """To the database."""
        return None if value is None else utc(value)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """From the database."""
        return None if value is None else utc(value)


# Names and tags compare by code point in both databases: prefixes are ranges of an index.
Label = String().with_variant(String(collation="C"), "postgresql")

metadata = MetaData()
schema = Table("gradmem_schema", metadata, Column("version", Integer, primary_key=True))
memories = Table(
    "gradmem_memories",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("owner", String, nullable=False),  # '' is the local user: NULLs would not be unique
    Column("name", Label),
    Column("content", String(64)),  # hash of what was written and how, while the current version is that
    Column("checkpoint", String(64), nullable=False),
    Column("model", String, nullable=False),
    Column("method", String, nullable=False),
    Column("pinned", Boolean, nullable=False),
    Column("version", Integer, nullable=False),  # the current one
    Column("bytes", BigInteger, nullable=False, server_default="0"),  # of the files of all versions
    Column("created", Moment, nullable=False),
    Column("updated", Moment, nullable=False),
    UniqueConstraint("owner", "name"),
    UniqueConstraint("owner", "content"),
    # Each begins with what is filtered and ends with the order of a listing, which so reads one page and no more.
    Index("gradmem_memories_created", "owner", "created", "id"),
    Index("gradmem_memories_name", "owner", "name", "created", "id"),
    Index("gradmem_memories_checkpoint", "owner", "checkpoint", "created", "id"),
    Index("gradmem_memories_model", "owner", "model", "created", "id"),
)
quota = Index("gradmem_memories_quota", memories.c.owner, memories.c.bytes)
"""How much an owner keeps, without reading any memory."""
versions = Table(
    "gradmem_versions",
    metadata,
    Column("memory", ForeignKey(memories.c.id, ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("created", Moment, nullable=False),
    Column("precision", String(8), nullable=False),
    Column("rows", Integer, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("kept", BigInteger, nullable=False),
    Column("unmeasured", BigInteger, nullable=False, server_default="0"),
    Column("answers", BigInteger),
    Column("at_risk", BigInteger),
    Column("loss_before", Float, nullable=False),
    Column("loss_after", Float, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("data", LargeBinary, nullable=False),  # last: SQLite reads what stands before it without it
)
tags = Table(
    "gradmem_tags",
    metadata,
    Column("memory", ForeignKey(memories.c.id, ondelete="CASCADE"), primary_key=True),
    Column("tag", Label, primary_key=True),
    Column("owner", String, nullable=False),  # as in the memory, and never changed there: for the index
    Column("created", Moment, nullable=False),
    Index("gradmem_tags_created", "owner", "tag", "created", "memory"),
    sqlite_with_rowid=False,
)
ADDED = (memories.c.bytes, versions.c.unmeasured, versions.c.answers, versions.c.at_risk)
"""Columns that came with version 2 of the tables."""


def locate(place: str | os.PathLike[str] | None) -> URL:
    """Find a store: a file, a URL, or by default `GRADMEM_STORE` or a file in the user's data directory.

    Raises
    ------
    GradmemError
        When a URL is neither of a SQLite file nor of PostgreSQL.
    """
    place = os.fspath(
        place or os.environ.get("GRADMEM_STORE") or Path(platformdirs.user_data_dir("gradmem"), "store.db")
    )
    if "://" not in place:
        return URL.create("sqlite", database=os.path.abspath(os.path.expanduser(place)))
    try:
        url = make_url(place)
    except (ArgumentError, ValueError) as error:
        raise GradmemError("the URL of a store is sqlite:///FILE or postgresql://USER@HOST/DATABASE") from error
    kind = url.drivername.partition("+")[0]
    if kind in ("postgresql", "postgres"):
        return url.set(drivername="postgresql+psycopg")
    if kind != "sqlite" or not url.database or url.database == ":memory:":
        raise GradmemError(f"a store is a SQLite file or PostgreSQL, not '{url.render_as_string()}'")
    return url


def connect(url: URL, create: bool) -> Engine:
    """Connect to a store, and make its tables where there are none.

    Raises
    ------
    GradmemError
        When there is no store and `create` is false, the tables are of a newer gradmem, a file is something else,
        or a package is missing.
    sqlalchemy.exc.SQLAlchemyError, OSError
        When the database cannot be reached.
    """
    name = url.render_as_string()
    if url.get_backend_name() == "sqlite":
        file = Path(url.database or "")
        if not create and not file.exists():
            raise Missing(f"no store at {file}: `gradmem write --store` makes one (GRADMEM_STORE says where)")
        make_private(file)  # SQLite gives the files beside it the same mode
        engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS})
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    else:
        try:
            # So that a statement sees what was committed before its turn came, whatever the server's own setting.
            engine = create_engine(url, pool_pre_ping=True, isolation_level="READ COMMITTED")
        except (ModuleNotFoundError, NoSuchModuleError) as error:
            raise GradmemError("PostgreSQL needs one more package: pip install 'gradmem[postgres]'") from error
        event.listen(engine, "begin", _begin_postgres)
    with engine.begin() as connection:
        found = _schema(connection, name)
    if found is None and not create:
        raise Missing(f"no store in {name}: `gradmem write --store` makes one")
    if found != SCHEMA:
        with engine.connect().execution_options(**{WRITER: ""}) as connection, connection.begin():
            _make_tables(connection, name)
    if url.get_backend_name() == "sqlite":
        for suffix in ("", "-wal", "-shm"):
            close_to_others(Path(f"{url.database}{suffix}"))
    return engine


def _schema(connection: Connection, name: str) -> int | None:
    """Version of the tables, or None where there are none."""
    inspector = inspect(connection)
    if not inspector.has_table(schema.name):
        if connection.dialect.name == "sqlite" and inspector.get_table_names():
            raise GradmemError(f"{name} is the database of another program")
        return None
    found = connection.scalar(select(schema.c.version))
    if found is None or found < 1:
        raise GradmemError(f"{name} is a damaged store: it does not say which version its tables are of")
    if found > SCHEMA:
        raise GradmemError(f"{name} has tables of version {found}, this gradmem knows {SCHEMA}: update gradmem")
    return int(found)


def _make_tables(connection: Connection, name: str) -> None:
    """Make the tables or bring them up to date, unless another process has done so since."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
    found = _schema(connection, name)
    if found is None:
        metadata.create_all(connection)
        connection.execute(insert(schema).values(version=SCHEMA))
    elif found < SCHEMA:
        _upgrade(connection)


def _upgrade(connection: Connection) -> None:
    """Give tables of version 1 what came with version 2."""
    for column in ADDED:
        lacking = CreateColumn(column).compile(dialect=connection.dialect)
        connection.execute(text(f"ALTER TABLE {column.table.name} ADD COLUMN {lacking}"))
    sizes = select(func.coalesce(func.sum(versions.c.size), 0)).where(versions.c.memory == memories.c.id)
    connection.execute(update(memories).values(bytes=sizes.scalar_subquery()))
    quota.create(connection)
    connection.execute(update(schema).values(version=SCHEMA))


def _prepare_sqlite(connection: sqlite3.Connection, _: Any) -> None:
    connection.isolation_level = None  # transactions begin where _begin_sqlite says so
    for setting in ("synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {setting}")
    # Turning on the log takes the whole file, and does not wait for others as everything else does.
    until = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(0.01)


def _begin_sqlite(connection: Connection) -> None:
    """Writers take their turn when they begin: a reader that later wants to write cannot always be let."""
    reads = connection.get_execution_options().get(WRITER) is None
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def _begin_postgres(connection: Connection) -> None:
    """Writers for one owner take turns too, so that what one has found still holds when it changes something.

    What is acknowledged is on the disk, whatever the server's own setting.
    """
    writer = connection.get_execution_options().get(WRITER)
    if writer is not None:
        connection.exec_driver_sql("SET LOCAL synchronous_commit = on")
        key = int.from_bytes(hashlib.sha256(writer.encode()).digest()[:8], "big", signed=True)
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(%s)", (key,))
