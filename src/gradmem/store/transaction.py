"""The queries and changes of one transaction, for one owner."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sqlalchemy import ColumnElement, Row, and_, delete, func, insert, select, update
from sqlalchemy.engine import Connection

from ..errors import Conflict, Missing, QuotaExceeded
from . import database as db
from .entries import Entry, Version
from .listing import labels
from .payloads import Payload, Payloads
from .rows import ENTRIES, ID, VERSION, insert_tags, insert_version, make_entry, make_version, now, version_of

if TYPE_CHECKING:
    from ..memory import Memory

_memories, _versions, _tags, _owners = db.memories.c, db.versions.c, db.tags.c, db.owners.c

PAYLOADS = "payloads"
"""Setting of a store: URL of the folder of large payloads."""


@dataclass(frozen=True)
class Quota:
    """How much each owner may store. None means unlimited.

    Attributes
    ----------
    memories : int or None
        Most memories.
    bytes : int or None
        Most bytes of their files, with all versions.
    """

    memories: int | None = None
    bytes: int | None = None


@dataclass(frozen=True)
class Transaction:
    """One transaction for one owner.

    A name may move to another memory between two transactions; the id of a memory never does.

    Attributes
    ----------
    connection : Connection
        Connection on which the transaction has begun. While it writes, no other transaction writes for this owner.
    owner : str
    location : str
        Location of the store, for messages.
    quota : Quota
    removed : list of str
        Names of the objects that are removed after the transaction.
    """

    connection: Connection
    owner: str
    location: str
    quota: Quota
    removed: list[str] = field(default_factory=list)

    # Reading

    @property
    def mine(self) -> ColumnElement[bool]:
        """Condition: the memory belongs to the owner."""
        return _memories.owner == self.owner

    def named(self, ref: str) -> ColumnElement[bool]:
        """Condition: the memory has this id or name. No name looks like an id."""
        if not ref.isprintable():  # databases differ in which of these they refuse
            raise self.missing(ref)
        return and_(self.mine, (_memories.id if ID.fullmatch(ref) else _memories.name) == ref)

    def missing(self, ref: str, version: int | None = None) -> Missing:
        """Build the error for a memory or a version that does not exist."""
        which = "" if version is None else f"version {version} of "
        return Missing(f"no {which}memory '{ref}' in {self.location}")

    def row(self, ref: str) -> Row[Any]:
        """Return the row of a memory."""
        row = self.connection.execute(select(db.memories).where(self.named(ref))).first()
        if row is None:
            raise self.missing(ref)
        return row

    def entry(self, ref: str) -> Entry:
        """Return the entry of a memory."""
        found = self.entries(self.named(ref))
        if not found:
            raise self.missing(ref)
        return found[0]

    def entries(self, condition: ColumnElement[bool]) -> Sequence[Entry]:
        """Return the entries of the memories that meet a condition."""
        return [make_entry(row) for row in self.connection.execute(ENTRIES.where(condition))]

    def page(self, ids: Sequence[str]) -> Sequence[Entry]:
        """Return the entries of memories in the order of their ids."""
        found = {entry.id: entry for entry in self.entries(_memories.id.in_(ids))}
        return [found[id] for id in ids if id in found]

    def versions(self, ref: str) -> Sequence[Version]:
        """Return all versions of a memory, the first one first."""
        query = select(*VERSION).join(db.memories).where(self.named(ref)).order_by(_versions.number)
        found = self.connection.execute(query).all()
        if not found:
            raise self.missing(ref)
        return [make_version(row) for row in found]

    def read(self, ref: str, version: int | None) -> tuple[Version, Payload]:
        """Return a version, by default the current one, and its payload, of which an object is not read."""
        wanted = _memories.version if version is None else _checked(version)
        query = select(*VERSION, _versions.data, _versions.object).join(db.memories)
        row = self.connection.execute(query.where(self.named(ref), _versions.number == wanted)).first()
        if row is None:
            raise self.missing(ref, version)
        *columns, data, name = row
        return make_version(columns), Payload(data, name)

    def payloads(self) -> Payloads | None:
        """Return the place of large payloads, or None if they are in the database."""
        url = self.connection.scalar(select(db.settings.c.value).where(db.settings.c.name == PAYLOADS))
        return None if url is None else Payloads(url)

    # Changing

    def reuse(self, content: str, name: str | None, tags: Sequence[str]) -> Entry | None:
        """Find a memory by the hash of its content. Add the tags, and the name if it has none.

        Raises
        ------
        Conflict
            If the memory has another name, or another memory has this name.
        """
        row = self.connection.execute(select(db.memories).where(self.mine, _memories.content == content)).first()
        self.check_free(name, row.id if row else None)
        if row is None:
            return None
        if row.name is not None and name not in (None, row.name):
            raise Conflict(f"this memory is stored already, as '{row.name}': rename it, or give no other name")
        present = self.connection.scalars(select(_tags.tag).where(_tags.memory == row.id)).all()
        if missing := [tag for tag in tags if tag not in present]:
            labels([*present, *missing])  # raises if these are too many tags
            insert_tags(self.connection, row._asdict(), missing)
        if missing or name not in (None, row.name):
            self.set_columns(row.id, name=name or row.name)
        return self.entry(row.id)

    def insert(
        self,
        memory: Memory,
        payload: Payload,
        content: str | None,
        name: str | None,
        tags: Sequence[str],
        memories: int = 1,
    ) -> Entry:
        """Store a new memory, under a name that no other memory has. It counts as so many `memories` of the quota."""
        version, receipt, moment = version_of(memory, payload.data), memory.receipts[0], now()
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
        self.take_room(version.size, memories)
        self.connection.execute(insert(db.memories).values(**values))
        insert_version(self.connection, values, version, payload)
        insert_tags(self.connection, values, tags)
        return self.entry(values["id"])

    def add_version(self, row: Row[Any], version: Version, payload: Payload) -> None:
        """Store another version of a memory, and make it the current one."""
        self.take_room(version.size)
        last = self.connection.scalar(select(func.max(_versions.number)).where(_versions.memory == row.id))
        number = (last or 0) + 1
        insert_version(self.connection, {"id": row.id, "version": number}, version, payload)
        self.make_current(row, number, bytes=row.bytes + version.size)

    def make_current(self, row: Row[Any], number: int, **values: Any) -> None:
        """Make a version the current one. The memory loses its content hash, which was that of the first version."""
        exists = select(_versions.number).where(_versions.memory == row.id, _versions.number == _checked(number))
        if self.connection.scalar(exists) is None:
            raise self.missing(row.name or row.id, number)
        self.set_columns(row.id, version=number, content=None, **values)

    def replace_tags(self, row: Row[Any], tags: Sequence[str]) -> None:
        """Replace the tags of a memory."""
        self.connection.execute(delete(db.tags).where(_tags.memory == row.id))
        insert_tags(self.connection, row._asdict(), tags)

    def set_columns(self, id: str, **values: Any) -> None:
        """Change columns of a memory, and its time of update."""
        self.connection.execute(update(db.memories).where(_memories.id == id).values(**values, updated=now()))

    def delete(self, which: ColumnElement[bool]) -> int:
        """Delete the memories that meet a condition, with all their versions, and return their number."""
        sums = select(func.count(), func.coalesce(func.sum(_memories.bytes), 0)).where(which)
        number, size = map(int, self.connection.execute(sums).one())
        # A text whose memory is deleted still counts as one.
        of_texts = select(func.count()).select_from(db.files.join(db.memories)).where(which)
        texts = self.connection.scalar(of_texts) or 0
        objects = select(_versions.object).join(db.memories).where(which, _versions.object.is_not(None))
        self.removed.extend(self.connection.scalars(objects))
        self.connection.execute(delete(db.memories).where(which))
        self.take_room(-size, texts - number)
        return number

    # Checking

    def check_free(self, name: str | None, id: str | None) -> None:
        """Raise `Conflict` if another memory has the name."""
        if name is None:
            return
        other = self.connection.scalar(select(_memories.id).where(self.mine, _memories.name == name))
        if other not in (None, id):
            raise Conflict(f"the name '{name}' is taken by another memory: update that memory, or choose another name")

    def check_room(self, size: int, memories: int = 0) -> None:
        """Raise `QuotaExceeded` if so many more memories and bytes would exceed the quota.

        Text files count too: their bytes, and as a memory each, whether or not it is written already.
        """
        quota, advice = self.quota, "delete memories that you no longer need, then try again"
        if quota == Quota():
            return
        totals = select(_owners.memories, _owners.bytes).where(_owners.owner == self.owner)
        there, used = self.connection.execute(totals).first() or (0, 0)
        if memories > 0 and quota.memories is not None and there + memories > quota.memories:
            raise QuotaExceeded(f"at most {quota.memories:,} memories may be stored, and {there:,} are: {advice}")
        if size > 0 and quota.bytes is not None and used + size > quota.bytes:
            raise QuotaExceeded(
                f"at most {quota.bytes:,} bytes of memories may be stored, and {used:,} are: {size:,} more do not fit: "
                f"{advice}"
            )

    def take_room(self, size: int, memories: int = 0) -> None:
        """Add memories and bytes to the owner's totals, or subtract them; see `check_room`."""
        self.check_room(size, memories)
        change = {"memories": _owners.memories + memories, "bytes": _owners.bytes + size}
        if not self.connection.execute(update(db.owners).where(_owners.owner == self.owner).values(**change)).rowcount:
            self.connection.execute(insert(db.owners).values(owner=self.owner, memories=memories, bytes=size))


def _checked(version: int) -> int:
    """Replace numbers that a database cannot hold by 0, which no version has."""
    return version if 0 < version < 2**31 else 0
