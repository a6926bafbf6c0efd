"""Rows of the tables: how entries and versions are read from them and written to them."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from datetime import datetime, timezone
from functools import partial
from typing import TYPE_CHECKING, Any

from sqlalchemy import and_, func, insert, select
from sqlalchemy.engine import Connection

from ..errors import GradmemError, require
from . import database as db
from .entries import Entry, Version
from .payloads import Payload

if TYPE_CHECKING:
    from ..memory import Memory

LARGEST = 10**9
"""Most bytes of a memory file: databases take no larger value."""
ID = re.compile("[0-9a-f]{32}")
VERSION = [db.versions.c[field.name] for field in fields(Version)]
_ENTRY = [db.memories.c[field.name] for field in fields(Entry) if field.name not in ("tags", "current")]
_TAGS = select(func.aggregate_strings(db.tags.c.tag, ",")).where(db.tags.c.memory == db.memories.c.id).scalar_subquery()
ENTRIES = select(*_ENTRY, *VERSION, _TAGS).join_from(
    db.memories,
    db.versions,
    and_(db.versions.c.memory == db.memories.c.id, db.versions.c.number == db.memories.c.version),
)
"""Memories with their current versions and tags."""


def now() -> datetime:
    """Return the time in UTC."""
    return datetime.now(timezone.utc)


def check_name(name: str | None) -> None:
    """Refuse names that look like an id, a filter or an option. None stands for no name."""
    if name is None:
        return
    valid = 0 < len(name) <= 200 and name.isprintable() and name == name.strip() and "*" not in name and name[0] != "-"
    require("a name", name, valid and not ID.fullmatch(name), "printable, up to 200 characters, without *, not an id")


def version_of(memory: Memory, data: bytes) -> Version:
    """Summarize a memory and its file as a version. The database assigns its number later.

    Raises
    ------
    GradmemError
        If a store cannot hold this memory.
    """
    from ..memory import stored_precision

    written = memory.history
    if not written or len({receipt.checkpoint for receipt in written}) != 1:
        raise GradmemError("a store holds memories of texts, each written by one checkpoint")
    require("the size of a memory", len(data), len(data) <= LARGEST, f"at most {LARGEST:,} bytes")
    losses = [loss for receipt in written for loss in (receipt.loss_before, receipt.loss_after)]
    if any(map(math.isnan, losses)):  # SQLite would keep it as NULL
        raise GradmemError("the write losses of the memory are NaN: the write has failed")
    tokens = [len(receipt.token_losses) for receipt in written]
    measured = [receipt for receipt in written if receipt.measured]
    mean = partial(_mean, weights=[len(receipt.token_losses) for receipt in measured])
    return Version(
        number=0,
        created=now(),
        precision=stored_precision(data),
        rows=len(memory),
        tokens=sum(tokens),
        kept=sum(len(receipt.token_losses) - len(receipt.lost) for receipt in measured),
        unmeasured=sum(tokens) - sum(len(receipt.token_losses) for receipt in measured),
        answers=_count([receipt.answers for receipt in written]),
        at_risk=_count([receipt.at_risk for receipt in written]),
        loss_before=mean([receipt.loss_before for receipt in measured]),
        loss_after=mean([receipt.loss_after for receipt in measured]),
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )


def _count(lists: Sequence[Sequence[Any] | None]) -> int | None:
    """Return the number of all elements, or None if one list is unknown."""
    return None if None in lists else sum(len(one or ()) for one in lists)


def _mean(values: Sequence[float], weights: Sequence[int]) -> float:
    return round(sum(value * weight for value, weight in zip(values, weights, strict=True)) / max(1, sum(weights)), 6)


def make_version(values: Sequence[Any]) -> Version:
    """Build a version from the columns `VERSION`."""
    return Version(**{column.name: value for column, value in zip(VERSION, values, strict=True)})


def make_entry(row: Sequence[Any]) -> Entry:
    """Build an entry from a row of `ENTRIES`."""
    columns = {column.name: value for column, value in zip(_ENTRY, row[: len(_ENTRY)], strict=True)}
    *version, tags = row[len(_ENTRY) :]
    return Entry(**columns, tags=tuple(sorted(tags.split(","))) if tags else (), current=make_version(version))


def insert_version(connection: Connection, memory: Mapping[str, Any], version: Version, payload: Payload) -> None:
    """Insert a version, under the number in the memory's row."""
    columns = {**asdict(version), "memory": memory["id"], "number": memory["version"], "object": payload.object}
    data = b"" if payload.object else payload.data
    connection.execute(insert(db.versions).values(**columns, data=data))


def insert_tags(connection: Connection, memory: Mapping[str, Any], tags: Sequence[str]) -> None:
    """Add tags to a memory."""
    columns = {"memory": memory["id"], "owner": memory["owner"], "created": memory["created"]}
    if tags:
        connection.execute(insert(db.tags), [{**columns, "tag": tag} for tag in tags])
