"""The tables of a store, and the settings of its connections to SQLite or PostgreSQL."""

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
    Text,
    TypeDecorator,
    UniqueConstraint,
    create_engine,
    event,
    insert,
    inspect,
    text,
)
from sqlalchemy.engine import URL, Connection, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from ..errors import GradmemError, Missing
from ..files import close_to_others, make_private
from . import migrations
from .migrations import HEAD, TABLE

BUSY_SECONDS = 60
"""Most seconds that a process waits for others that write to the same SQLite file."""
WRITER = "writer"
"""Execution option of a connection: the owner for whom it writes, or None if it only reads."""
_LOCK = 0x67726164
"""Key of the PostgreSQL lock under which one process creates the tables."""


def utc(moment: datetime) -> datetime:
    """Convert a time to UTC. A time without a time zone is taken as UTC."""
    return moment.replace(tzinfo=timezone.utc) if moment.tzinfo is None else moment.astimezone(timezone.utc)


class Moment(TypeDecorator[datetime]):
    """A time in UTC. SQLite stores no time zone, and PostgreSQL returns times in that of the session."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Convert a value for the database."""
        return None if value is None else utc(value)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Convert a value from the database."""
        return None if value is None else utc(value)


# Names and tags compare by code point in both databases, so that a prefix is a range of an index.
Label = String().with_variant(String(collation="C"), "postgresql")

metadata = MetaData()
schema = Table(TABLE, MetaData(), Column("version_num", String(32), primary_key=True))
"""The version of the tables, for Alembic. Whatever changes the other tables is a file in `migrations/versions`."""
owners = Table(
    "gradmem_owners",
    metadata,
    Column("owner", String, primary_key=True),
    # Totals for quotas, so that nothing need be counted: memories and texts without one, and the bytes of all.
    Column("memories", BigInteger, nullable=False),
    Column("bytes", BigInteger, nullable=False),
)
settings = Table(
    "gradmem_settings",
    metadata,
    Column("name", String, primary_key=True),
    Column("value", Text, nullable=False),
)
memories = Table(
    "gradmem_memories",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("owner", String, nullable=False),  # '' is the local user, since NULLs are not unique
    Column("name", Label),
    Column("content", String(64)),  # see `content_hash`; NULL once another version is current
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
    # Each index ends with the order of a listing, so that a page reads no more rows than it shows.
    Index("gradmem_memories_created", "owner", "created", "id"),
    Index("gradmem_memories_checkpoint", "owner", "checkpoint", "created", "id"),
    Index("gradmem_memories_model", "owner", "model", "created", "id"),
)
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
    # The payload is last, so that SQLite reads the other columns without it.
    Column("data", LargeBinary, nullable=False),  # empty if it is an object
    Column("object", String),  # name of the object outside the database, see `payloads`
)
Index(
    "gradmem_versions_object",
    versions.c.object,
    unique=True,
    postgresql_where=versions.c.object.is_not(None),
    sqlite_where=versions.c.object.is_not(None),
)
tags = Table(
    "gradmem_tags",
    metadata,
    Column("memory", ForeignKey(memories.c.id, ondelete="CASCADE"), primary_key=True),
    Column("tag", Label, primary_key=True),
    Column("owner", String, nullable=False),  # copied from the memory, for the index
    Column("created", Moment, nullable=False),
    Index("gradmem_tags_created", "owner", "tag", "created", "memory"),
    sqlite_with_rowid=False,
)
files = Table(
    "gradmem_files",
    metadata,
    Column("owner", String, primary_key=True),
    Column("path", Label, primary_key=True),
    Column("text", Text, nullable=False),
    Column("size", BigInteger, nullable=False),  # bytes of the text
    Column("created", Moment, nullable=False),
    Column("updated", Moment, nullable=False),
    Column("memory", ForeignKey(memories.c.id, ondelete="SET NULL"), index=True),  # written from this text
)


def locate(location: str | os.PathLike[str] | None) -> URL:
    """Return the URL of a store, by default of `GRADMEM_STORE` or of a file in the user's data directory.

    Raises
    ------
    GradmemError
        If the URL is neither of a SQLite file nor of PostgreSQL.
    """
    location = os.fspath(
        location or os.environ.get("GRADMEM_STORE") or Path(platformdirs.user_data_dir("gradmem"), "store.db")
    )
    if "://" not in location:
        return URL.create("sqlite", database=os.path.abspath(os.path.expanduser(location)))
    try:
        url = make_url(location)
    except (ArgumentError, ValueError) as error:
        raise GradmemError("the URL of a store is sqlite:///FILE or postgresql://USER@HOST/DATABASE") from error
    kind = url.drivername.partition("+")[0]
    if kind in ("postgresql", "postgres"):
        return url.set(drivername="postgresql+psycopg")
    if kind != "sqlite" or not url.database or url.database == ":memory:":
        raise GradmemError(f"a store is a SQLite file or PostgreSQL, not '{url.render_as_string()}'")
    return url


def connect(url: URL, create: bool, upgrade: bool = False) -> Engine:
    """Connect to a store. Create its tables if there are none, and upgrade those of an older gradmem.

    A database server may serve processes of both versions of gradmem, so its tables are upgraded only if `upgrade` is
    true.

    Raises
    ------
    GradmemError
        If there is no store and `create` is false, a newer gradmem made the tables, or an older one those of a server
        and `upgrade` is false, the file is something else, or a package is missing.
    sqlalchemy.exc.SQLAlchemyError, OSError
        If the database cannot be reached.
    """
    name = url.render_as_string()
    if url.get_backend_name() == "sqlite":
        file = Path(url.database or "")
        if not create and not file.exists():
            raise Missing(f"no store at {file}: `gradmem write --store` creates one (GRADMEM_STORE sets its location)")
        make_private(file)  # SQLite gives its other files the same mode
        engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS})
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    else:
        try:
            # A statement must see what was committed while it waited for the lock, whatever the server's setting.
            engine = create_engine(url, pool_pre_ping=True, isolation_level="READ COMMITTED")
        except (ModuleNotFoundError, NoSuchModuleError) as error:
            raise GradmemError("PostgreSQL needs one more package: pip install 'gradmem[postgres]'") from error
        event.listen(engine, "connect", _prepare_postgres)
        event.listen(engine, "begin", _begin_postgres)
    with engine.begin() as connection:
        found = _version(connection, name)
    if found is None and not create:
        raise Missing(f"no store in {name}: `gradmem write --store` creates one")
    if found is not None and found != HEAD and not (upgrade or engine.dialect.name == "sqlite"):
        raise GradmemError(
            f"{name} has tables of version {found}; this gradmem needs {HEAD}: stop the others that use it, make a "
            "backup, and run `gradmem store upgrade`"
        )
    if found != HEAD:
        with engine.connect().execution_options(**{WRITER: ""}) as connection, connection.begin():
            _make_tables(connection, name)
    if url.get_backend_name() == "sqlite":
        for suffix in ("", "-wal", "-shm"):
            close_to_others(Path(f"{url.database}{suffix}"))
    return engine


def _version(connection: Connection, name: str) -> str | None:
    """Return the version of the tables, or None if there are none."""
    inspector = inspect(connection)
    if not inspector.has_table(schema.name):
        if connection.dialect.name == "sqlite" and inspector.get_table_names():
            raise GradmemError(f"{name} is the database of another program")
        return None
    # Before version 4 the column was a number, under another name.
    row = connection.exec_driver_sql(f"SELECT * FROM {schema.name}").first()
    found = str(row[0]) if row is not None else ""
    if not found.isdecimal():
        raise GradmemError(f"{name} is a damaged store: the version of its tables is missing")
    if int(found) > int(HEAD):
        raise GradmemError(f"{name} has tables of version {found}; this gradmem knows {HEAD}: update gradmem")
    return found


def _make_tables(connection: Connection, name: str) -> None:
    """Create or upgrade the tables, unless another process has done so meanwhile."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
    found = _version(connection, name)
    if found is None:
        metadata.create_all(connection)
    if found is None or int(found) < 4:
        schema.drop(connection, checkfirst=True)
        schema.create(connection)
        connection.execute(insert(schema).values(version_num=found or HEAD))
    if found not in (None, HEAD):
        migrations.upgrade(connection)


def _prepare_sqlite(connection: sqlite3.Connection, _: Any) -> None:
    connection.isolation_level = None  # _begin_sqlite begins the transactions
    for setting in ("synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {setting}")
    # This locks the whole file, and unlike everything else fails at once if another process has locked it.
    until = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(0.01)


def _prepare_postgres(connection: Any, _: Any) -> None:
    """Plan each query for its own values, and run it at once: compiling takes longer than any of them should."""
    connection.execute("SET jit = off")
    connection.execute("SET plan_cache_mode = force_custom_plan")
    connection.commit()


def _begin_sqlite(connection: Connection) -> None:
    """Lock the file when a writing transaction begins: a reader that writes later could fail."""
    reads = connection.get_execution_options().get(WRITER) is None
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def _begin_postgres(connection: Connection) -> None:
    """Lock the owner when a writing transaction begins, so that what it has read stays valid.

    Commits reach the disk before they return, whatever the server's setting.
    """
    writer = connection.get_execution_options().get(WRITER)
    if writer is not None:
        connection.exec_driver_sql("SET LOCAL synchronous_commit = on")
        key = int.from_bytes(hashlib.sha256(writer.encode()).digest()[:8], "big", signed=True)
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(%s)", (key,))
