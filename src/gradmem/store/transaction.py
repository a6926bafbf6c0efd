"""One transaction of an owner: what is found in it still holds when something is changed in it."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import ColumnElement, Row, and_, delete, func, insert, select, update
from sqlalchemy.engine import Connection

from ..errors import Conflict, Missing, QuotaExceeded, Unavailable
from . import database as db
from .entries import Entry, Version
from .listing import labels
from .rows import ENTRIES, ID, VERSION, insert_tags, insert_version, make_entry, make_version, now, version_of

if TYPE_CHECKING:
    from ..memory import Memory

_memories, _versions, _tags = db.memories.c, db.versions.c, db.tags.c


@dataclass(frozen=True)
class Quota:
    """How much each owner may keep; None is as much as there is room for.

    Attributes
    ----------
    memories : int or None
    bytes : int or None
        Of their files, versions among them.
    """

    memories: int | None = None
    bytes: int | None = None


@dataclass(frozen=True)
class Transaction:
    """What a store does with its tables for one owner, in one transaction.

    Names may move between two transactions: within one, a memory is told by its id.

    Attributes
    ----------
    connection : Connection
        On which the transaction has begun; where it writes, no other one writes for this owner meanwhile.
    owner : str
    place : str
        Where the store is, for messages.
    quota : Quota
    """

    connection: Connection
    owner: str
    place: str
    quota: Quota

    # Finding

    @property
    def mine(self) -> ColumnElement[bool]:
        """The memories of the owner."""
        return _memories.owner == self.owner

    def named(self, ref: str) -> ColumnElement[bool]:
        """The memory of this id or name: no name looks like an id, and databases differ in what else they refuse."""
        if not ref.isprintable():
            raise self.missing(ref)
        return and_(self.mine, (_memories.id if ID.fullmatch(ref) else _memories.name) == ref)

    def missing(self, ref: str, version: int | None = None) -> Missing:
        """The error for a memory, or a version, that is not there."""
        which = "" if version is None else f"version {version} of "
        return Missing(f"no {which}memory '{ref}' in {self.place}")

    def row(self, ref: str) -> Row[Any]:
        """The row of a memory."""
        row = self.connection.execute(select(db.memories).where(self.named(ref))).first()
        if row is None:
            raise self.missing(ref)
        return row

    def entry(self, ref: str) -> Entry:
        """What the store says of a memory."""
        found = self.entries(self.named(ref))
        if not found:
            raise self.missing(ref)
        return found[0]

    def entries(self, condition: ColumnElement[bool]) -> Sequence[Entry]:
        """Memories with their current versions and tags, the newest first."""
        return [make_entry(row) for row in self.connection.execute(ENTRIES.where(condition))]

    def versions(self, ref: str) -> Sequence[Version]:
        """All versions of a memory, the first one first."""
        query = select(*VERSION).join(db.memories).where(self.named(ref)).order_by(_versions.number)
        found = self.connection.execute(query).all()
        if not found:
            raise self.missing(ref)
        return [make_version(row) for row in found]

    def stored(self, ref: str, version: int | None) -> tuple[Version, bytes]:
        """A version, by default the current one, and its bytes, whose checksum is verified."""
        wanted = _memories.version if version is None else _checked(version)
        query = select(*VERSION, _versions.data).join(db.memories)
        row = self.connection.execute(query.where(self.named(ref), _versions.number == wanted)).first()
        if row is None:
            raise self.missing(ref, version)
        *about, data = row
        found = make_version(about)
        if not isinstance(data, bytes) or hashlib.sha256(data).hexdigest() != found.sha256:
            raise Unavailable(f"memory '{ref}' is damaged in {self.place}: it does not match its checksum")
        return found, data

    # Changing

    def kept(self, content: str, name: str | None, tags: Sequence[str]) -> Entry | None:
        """Find what is kept already, and give it a name, where it has none, and tags besides those it has.

        Raises
        ------
        Conflict
            When it has another name, or another memory has this one.
        """
        row = self.connection.execute(select(db.memories).where(self.mine, _memories.content == content)).first()
        self.check_free(name, row.id if row else None)
        if row is None:
            return None
        if row.name is not None and name not in (None, row.name):
            raise Conflict(f"this memory is kept already, as '{row.name}': rename it, or give no other name")
        present = self.connection.scalars(select(_tags.tag).where(_tags.memory == row.id)).all()
        if missing := [tag for tag in tags if tag not in present]:
            labels([*present, *missing])  # are they too many together?
            insert_tags(self.connection, row._asdict(), missing)
        if missing or name not in (None, row.name):
            self.set(row.id, name=name or row.name)
        return self.entry(row.id)

    def insert(self, memory: Memory, data: bytes, content: str, name: str | None, tags: Sequence[str]) -> Entry:
        """Keep a memory that is not kept yet, under a name that is free."""
        version, receipt, moment = version_of(memory, data), memory.receipts[0], now()
        values: dict[str, Any] = {
            "id": secrets.token_hex(16),
            "owner": self.owner,
            "name": name,
            "content": content,
            "checkpoint": receipt.checkpoint,
            "model": receipt.model,
            "method": receipt.method,
            "pinned": False,
            "version": 1,
            "bytes": version.size,
            "created": moment,
            "updated": moment,
        }
        self.check_room(version.size, memories=1)
        self.connection.execute(insert(db.memories).values(**values))
        insert_version(self.connection, values, version, data)
        insert_tags(self.connection, values, tags)
        return self.entry(values["id"])

    def add_version(self, row: Row[Any], version: Version, data: bytes) -> None:
        """Keep another version of a memory and make it the current one."""
        self.check_room(version.size)
        last = self.connection.scalar(select(func.max(_versions.number)).where(_versions.memory == row.id))
        number = (last or 0) + 1
        insert_version(self.connection, {"id": row.id, "version": number}, version, data)
        self.make_current(row, number, bytes=row.bytes + version.size)

    def make_current(self, row: Row[Any], number: int, **values: Any) -> None:
        """Make a version the current one; the memory is no longer what was once written: that would be written anew."""
        there = select(_versions.number).where(_versions.memory == row.id, _versions.number == _checked(number))
        if self.connection.scalar(there) is None:
            raise self.missing(row.name or row.id, number)
        self.set(row.id, version=number, content=None, **values)

    def retag(self, row: Row[Any], tags: Sequence[str]) -> None:
        """Give a memory these tags in place of those it has."""
        self.connection.execute(delete(db.tags).where(_tags.memory == row.id))
        insert_tags(self.connection, row._asdict(), tags)

    def set(self, id: str, **values: Any) -> None:
        """Change columns of a memory."""
        self.connection.execute(update(db.memories).where(_memories.id == id).values(**values, updated=now()))

    # Refusing

    def check_free(self, name: str | None, id: str | None) -> None:
        """Refuse a name that another memory has."""
        if name is None:
            return
        other = self.connection.scalar(select(_memories.id).where(self.mine, _memories.name == name))
        if other not in (None, id):
            raise Conflict(f"the name '{name}' is taken by another memory: update that one, or take another name")

    def check_room(self, size: int, memories: int = 0) -> None:
        """Refuse what would go beyond the owner's quota."""
        most, advice = self.quota, "delete memories that are not needed, then try again"
        if most == Quota():
            return
        query = select(func.count(), func.coalesce(func.sum(_memories.bytes), 0)).where(self.mine)
        there, used = map(int, self.connection.execute(query).one())
        if memories and most.memories is not None and there + memories > most.memories:
            raise QuotaExceeded(f"at most {most.memories:,} memories may be kept, and {there:,} are: {advice}")
        if most.bytes is not None and used + size > most.bytes:
            raise QuotaExceeded(
                f"at most {most.bytes:,} bytes of memories may be kept, and {used:,} are, so that {size:,} more do not "
                f"fit: {advice}"
            )


def _checked(version: int) -> int:
    """The number of a version, or 0, which none has, in place of what no database takes as a number."""
    return version if 0 < version < 2**31 else 0
