"""The store: one object over one database, seen by one owner."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from datetime import datetime, timezone
from functools import partial
from typing import TYPE_CHECKING, Any

from sqlalchemy import ColumnElement, Row, and_, delete, func, insert, or_, select, update
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError
from typing_extensions import Unpack

from ..choices import Precision
from ..errors import Conflict, GradmemError, Missing, Unavailable, require
from ..records import text_digest
from . import database as db
from .entries import Diff, Entry, Version
from .listing import Filters, labels, matching

if TYPE_CHECKING:
    from ..memory import Memory
    from ..model import MemoryModel

LARGEST = 10**9
"""Bytes that a database takes in one value."""
PAGE = 1000
"""Most memories of one page of a listing."""
_ID = re.compile("[0-9a-f]{32}")
_VERSION = [db.versions.c[field.name] for field in fields(Version)]
_ENTRY = [db.memories.c[field.name] for field in fields(Entry) if field.name not in ("tags", "current")]
_TAGS = select(func.aggregate_strings(db.tags.c.tag, ",")).where(db.tags.c.memory == db.memories.c.id).scalar_subquery()
_ENTRIES = (
    select(*_ENTRY, *_VERSION, _TAGS)
    .join_from(
        db.memories,
        db.versions,
        and_(db.versions.c.memory == db.memories.c.id, db.versions.c.number == db.memories.c.version),
    )
    .order_by(db.memories.c.created.desc(), db.memories.c.id.desc())
)
"""Memories with their current versions and tags, the newest first."""


class Store:
    """Memories in one database, each with an id, and perhaps a name and tags; every change is a transaction.

    Processes may read and write one store at the same time. What a method has returned from is on the disk, and
    what a process was killed in the middle of has not happened.

    Parameters
    ----------
    place : str or path, optional
        SQLite file, or URL (`sqlite:///FILE`, `postgresql://USER@HOST/DATABASE`). By default `GRADMEM_STORE`, or else
        a file in the user's data directory.
    owner : str, optional
        Whose memories it shows and keeps: another owner's do not exist for it. By default the local user's.
    create : bool
        Make the store where there is none.

    Raises
    ------
    GradmemError
        When it cannot be opened, is something else, or was made by a newer gradmem. All methods raise it when the
        database fails.
    """

    def __init__(
        self, place: str | os.PathLike[str] | None = None, owner: str | None = None, *, create: bool = True
    ) -> None:
        require("owner", owner, owner != "", "a name, or None for the local user")
        self._owner = owner or ""
        self._url = db.locate(place)
        with self._told():
            self._engine = db.connect(self._url, create)

    def __repr__(self) -> str:
        return f"Store({self._place!r})"

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections, those of views of other owners too."""
        self._engine.dispose()

    def owned_by(self, owner: str | None) -> Store:
        """The same store as another owner sees it, over the same connections."""
        require("owner", owner, owner != "", "a name, or None for the local user")
        view = copy.copy(self)
        view._owner = owner or ""
        return view

    # Keeping

    def write(
        self,
        model: MemoryModel,
        text: str | Sequence[str],
        steps: int | None = None,
        *,
        until: float | None = None,
        max_steps: int | None = None,
        precision: Precision = "float32",
        name: str | None = None,
        tags: str | Sequence[str] = (),
        **options: Any,
    ) -> Entry:
        """Write a text, or the chunks of one, into a memory and keep it; what is kept already is not written again.

        Parameters
        ----------
        model : MemoryModel
        text : str or sequence of str
        steps, until, max_steps, options
            As in `MemoryModel.write`.
        precision : {"float32", "float16", "int8"}
        name : str, optional
            For a memory that is kept already: given to it where it has none.
        tags : str or sequence of str
            Added to those of a memory that is kept already. Several in one string are separated by commas.

        Returns
        -------
        Entry
            That of the same text, checkpoint, steps and precision, where there is one.

        Raises
        ------
        GradmemError
            When the name is another memory's, or the same memory has another name.
        """
        texts = [text] if isinstance(text, str) else list(text)
        content = content_of(model, texts, steps, until, max_steps, precision)
        if known := self.known(content, name=name, tags=tags):
            return known
        memory = model.write(texts, steps, until=until, max_steps=max_steps, **options)
        return self.put(memory, name=name, tags=tags, precision=precision, content=content)

    def put(
        self,
        memory: Memory | bytes,
        *,
        name: str | None = None,
        tags: str | Sequence[str] = (),
        precision: Precision = "float32",
        content: str | None = None,
    ) -> Entry:
        """Keep a memory that was written before; the same one is kept once.

        Parameters
        ----------
        memory : Memory or bytes
            The bytes of a memory file are kept as they are.
        name, tags
            As in `write`.
        precision : {"float32", "float16", "int8"}
            In which a `Memory` is stored.
        content : str, optional
            What it was written from and how (`content_of`); by default it stands for itself.

        Raises
        ------
        GradmemError
            When the bytes are no memory file, the memory does not say who wrote it, or its name is taken.
        """
        from ..memory import Memory, identity

        data = memory if isinstance(memory, bytes) else memory.to_bytes(precision)
        loaded = Memory.from_bytes(data) if isinstance(memory, bytes) else memory
        content = content or identity(data)
        return self.known(content, name=name, tags=tags) or self._keep(loaded, data, content, name, tags)

    def known(self, content: str, *, name: str | None = None, tags: str | Sequence[str] = ()) -> Entry | None:
        """Find what is kept already and give it name and tags, as `write`; or make sure that the name is free.

        Parameters
        ----------
        content : str
            What was written and how; see `content_of`.

        Raises
        ------
        GradmemError
            As `write`.
        """
        wanted = labels(tags)
        same = db.memories.c.content == content
        if name is not None:
            _check_name(name)
            same = or_(same, db.memories.c.name == name)
        with self._connection() as connection:
            query = select(db.memories.c.content, db.memories.c.id).where(self._mine, same)
            found = {row.content: row.id for row in connection.execute(query)}
        if content not in found:
            if found:
                raise _taken(name)
            return None
        return self._described(found[content], name, wanted)

    def _described(self, id: str, name: str | None, tags: Sequence[str]) -> Entry:
        """Give a memory a name, where it has none, and tags besides those it has."""
        entry = self.get(id)
        if name in (None, entry.name) and set(tags) <= set(entry.tags):
            return entry
        try:
            with self._connection(writes=True) as connection:
                row = self._locked(connection, id)
                if row.name is not None and name not in (None, row.name):
                    raise Conflict(f"this memory is kept already, as '{row.name}': rename it, or give no other name")
                present = connection.scalars(select(db.tags.c.tag).where(db.tags.c.memory == id)).all()
                _insert_tags(connection, row._asdict(), [tag for tag in tags if tag not in present])
                change = update(db.memories).where(db.memories.c.id == id)
                connection.execute(change.values(name=name or row.name, updated=_now()))
        except IntegrityError as error:
            raise _taken(name) from error
        return self.get(id)

    def _keep(self, memory: Memory, data: bytes, content: str, name: str | None, tags: str | Sequence[str]) -> Entry:
        """Insert a memory, unless another process has done so since."""
        version, record, now = _version(memory, data), memory.records[0], _now()
        values: dict[str, Any] = {
            "id": secrets.token_hex(16),
            "owner": self._owner,
            "name": name,
            "content": content,
            "checkpoint": record.checkpoint,
            "model": record.model,
            "method": record.method,
            "pinned": False,
            "version": 1,
            "created": now,
            "updated": now,
        }
        try:
            with self._connection(writes=True) as connection:
                connection.execute(insert(db.memories).values(**values))
                _insert_version(connection, values, version, data)
                _insert_tags(connection, values, labels(tags))
        except IntegrityError as error:
            if known := self.known(content, name=name, tags=tags):
                return known
            raise GradmemError(f"cannot keep the memory: {_reason(error)}") from error
        return self.get(values["id"])

    # Reading

    def get(self, ref: str) -> Entry:
        """What the store says of a memory.

        Parameters
        ----------
        ref : str
            Id or name, as in all methods.

        Raises
        ------
        Missing
            When there is none; so do all methods.
        """
        with self._connection() as connection:
            found = self._entries(connection, self._is(ref))
        if not found:
            raise self._missing(ref)
        return found[0]

    def read(self, ref: str, version: int | None = None) -> bytes:
        """The bytes of a memory file, by default of the current version; their checksum has been verified.

        Raises
        ------
        GradmemError
            When there is no such memory or version, or its bytes are not those that were stored.
        """
        wanted = db.memories.c.version if version is None else version
        query = select(db.versions.c.data, db.versions.c.sha256).join(db.memories)
        with self._connection() as connection:
            found = connection.execute(query.where(self._is(ref), db.versions.c.number == wanted)).first()
        if found is None:
            raise self._missing(ref, version)
        data, sha256 = found
        if not isinstance(data, bytes) or hashlib.sha256(data).hexdigest() != sha256:
            raise Unavailable(f"memory '{ref}' is damaged in {self._place}: it does not match its checksum")
        return data

    def load(self, ref: str, version: int | None = None) -> Memory:
        """A memory, bound to no model; see `read`."""
        from ..memory import Memory

        return Memory.from_bytes(self.read(ref, version), f"memory '{ref}'")

    def open(self, ref: str, version: int | None = None) -> Memory:
        """A memory bound to the checkpoint that wrote it, ready to be asked; see `gradmem.open`."""
        from ..checkpoints import bind_memory

        return bind_memory(self.load(ref, version), f"memory '{ref}'")

    def list(self, *, limit: int = 50, after: str | None = None, **filters: Unpack[Filters]) -> Sequence[Entry]:
        """One page of the memories that match all filters, the newest first.

        Parameters
        ----------
        limit : int
            Most memories of the page, up to 1,000.
        after : str, optional
            `Entry.cursor` of the last memory of the page before.
        filters
            `checkpoint` (name or fingerprint), `name` (or its beginning and a *), `tags` (all of them), and `since`
            and `until`, times of creation (the latter excluded), in UTC where they have no zone.

        Raises
        ------
        GradmemError
            When a limit or a cursor is none.
        """
        require("limit", limit, 1 <= limit <= PAGE, f"from 1 to {PAGE}")
        with self._connection() as connection:
            page = matching(connection, self._owner, filters, after).limit(limit)
            return self._entries(connection, db.memories.c.id.in_(page))

    # Changing

    def rename(self, ref: str, name: str | None) -> Entry:
        """Give a memory another name, or none.

        Raises
        ------
        GradmemError
            When there is no such memory, the name is taken or none.
        """
        if name is not None:
            _check_name(name)
        try:
            return self._change(ref, name=name)
        except IntegrityError as error:
            raise _taken(name) from error

    def pin(self, ref: str, pinned: bool = True) -> Entry:
        """Keep a memory from being deleted, or no longer do."""
        return self._change(ref, pinned=pinned)

    def tag(self, ref: str, tags: str | Sequence[str]) -> Entry:
        """Give a memory these tags in place of those it has."""
        wanted = labels(tags)
        with self._connection(writes=True) as connection:
            row = self._locked(connection, ref)
            connection.execute(delete(db.tags).where(db.tags.c.memory == row.id))
            _insert_tags(connection, row._asdict(), wanted)
            connection.execute(update(db.memories).where(db.memories.c.id == row.id).values(updated=_now()))
        return self.get(row.id)

    def delete(self, ref: str) -> None:
        """Delete a memory with all its versions.

        Raises
        ------
        GradmemError
            When there is none, or it is pinned.
        """
        with self._connection(writes=True) as connection:
            row = self._locked(connection, ref)
            if row.pinned:
                raise Conflict(f"memory '{ref}' is pinned: unpin it first")
            connection.execute(delete(db.memories).where(db.memories.c.id == row.id))

    def prune(self, **filters: Unpack[Filters]) -> int:
        """Delete all memories that match all filters, but for pinned ones; return how many. See `list`."""
        with self._connection(writes=True) as connection:
            ids = db.memories.c.id.in_(matching(connection, self._owner, filters).order_by(None))
            done = connection.execute(delete(db.memories).where(ids, db.memories.c.pinned.is_(False)))
        return done.rowcount

    def _change(self, ref: str, **values: Any) -> Entry:
        with self._connection(writes=True) as connection:
            row = self._locked(connection, ref)
            change = update(db.memories).where(db.memories.c.id == row.id)
            connection.execute(change.values(**values, updated=_now()))
        return self.get(row.id)

    # Versions

    def update(
        self, ref: str, memory: Memory, *, precision: Precision | None = None, expected: int | None = None
    ) -> Entry:
        """Keep a memory as the next version of another, which becomes the current one.

        Parameters
        ----------
        ref : str
        memory : Memory
            Written by the same checkpoint.
        precision : {"float32", "float16", "int8"}, optional
            By default that of the current version.
        expected : int, optional
            The version that `memory` was made from: refuse when another has become current since.

        Raises
        ------
        GradmemError
            When there is no such memory, another checkpoint wrote it, or another version is current.
        """
        data = memory.to_bytes(precision or self.get(ref).current.precision)
        version = _version(memory, data)
        with self._connection(writes=True) as connection:
            row = self._locked(connection, ref)
            if row.checkpoint != memory.records[0].checkpoint:
                raise Conflict(f"all versions of a memory are by one checkpoint; '{ref}' is by '{row.model}'")
            if expected not in (None, row.version):
                raise Conflict(f"'{ref}' has changed meanwhile: version {row.version} is current, not {expected}")
            last = connection.scalar(select(func.max(db.versions.c.number)).where(db.versions.c.memory == row.id))
            # No longer what was once written: that text would be written anew.
            values = {"version": (last or 0) + 1, "content": None, "updated": _now()}
            _insert_version(connection, {"id": row.id, **values}, version, data)
            connection.execute(update(db.memories).where(db.memories.c.id == row.id).values(**values))
        return self.get(row.id)

    def append(self, ref: str, text: str | Sequence[str], model: MemoryModel, **options: Any) -> Entry:
        """Write more text into a memory, as its next version.

        Parameters
        ----------
        ref : str
        text : str or sequence of str
            One for each row.
        model : MemoryModel
            The one that wrote the memory.
        options
            As in `MemoryModel.append`.

        Raises
        ------
        GradmemError
            When another process has changed it meanwhile, or as `MemoryModel.append` does.
        """
        entry = self.get(ref)
        memory = model.bind(self.load(entry.id, entry.current.number), f"memory '{ref}'")
        longer = model.append(memory, text, **options)
        return self.update(entry.id, longer, expected=entry.current.number)

    def versions(self, ref: str) -> Sequence[Version]:
        """All versions of a memory, the first one first."""
        query = select(*_VERSION).join(db.memories).where(self._is(ref)).order_by(db.versions.c.number)
        with self._connection() as connection:
            found = connection.execute(query).all()
        if not found:
            raise self._missing(ref)
        return [_make_version(row) for row in found]

    def rollback(self, ref: str, version: int) -> Entry:
        """Make another version the current one. None is deleted: a later one can come back in the same way."""
        if version not in (one.number for one in self.versions(ref)):
            raise self._missing(ref, version)
        return self._change(ref, version=version, content=None)

    def diff(self, ref: str, a: int, b: int) -> Diff:
        """What became of version a's tokens in version b, by their receipts."""
        numbered = {version.number: version for version in self.versions(ref)}
        for number in (a, b):
            if number not in numbered:
                raise self._missing(ref, number)
        return Diff.of(numbered[a], numbered[b], (self.load(ref, a).records, self.load(ref, b).records))

    # The database

    @property
    def _place(self) -> str:
        return self._url.render_as_string() if self._url.host else str(self._url.database)

    @property
    def _mine(self) -> ColumnElement[bool]:
        return db.memories.c.owner == self._owner

    def _is(self, ref: str) -> ColumnElement[bool]:
        """The memory of this id or name: no name looks like an id, and databases differ in what else they refuse."""
        if not ref.isprintable():
            raise self._missing(ref)
        return and_(self._mine, (db.memories.c.id if _ID.fullmatch(ref) else db.memories.c.name) == ref)

    def _missing(self, ref: str, version: int | None = None) -> Missing:
        which = "" if version is None else f"version {version} of "
        shown = ref if ref.isprintable() else ascii(ref)[1:-1]
        return Missing(f"no {which}memory '{shown}' in {self._place}")

    def _locked(self, connection: Connection, ref: str) -> Row[Any]:
        """The row of a memory, which no other process changes before this transaction ends."""
        row = connection.execute(select(db.memories).where(self._is(ref)).with_for_update()).first()
        if row is None:
            raise self._missing(ref)
        return row

    def _entries(self, connection: Connection, condition: ColumnElement[bool]) -> Sequence[Entry]:
        """Memories with their current versions and tags, the newest first."""
        return [_make_entry(row) for row in connection.execute(_ENTRIES.where(condition))]

    @contextmanager
    def _connection(self, writes: bool = False) -> Iterator[Connection]:
        """A transaction, which takes place as a whole or not at all."""
        with self._told(), self._engine.connect().execution_options(writes=writes) as connection, connection.begin():
            yield connection

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Say in one line what is wrong with the database; constraints are the caller's to explain."""
        try:
            yield
        except IntegrityError:
            raise
        except (SQLAlchemyError, OSError, ValueError) as error:
            raise Unavailable(f"cannot use the store {self._place}: {_reason(error)}") from error


def content_of(
    model: MemoryModel,
    texts: Sequence[str],
    steps: int | None = None,
    until: float | None = None,
    max_steps: int | None = None,
    precision: Precision = "float32",
) -> str:
    """Hash of what `Store.write` with these arguments would write, and how."""
    # The fingerprint of the checkpoint covers the method and the options that it was trained with.
    settings = [model.chosen, model.most_steps(steps, until, max_steps), until, precision]
    return _hash([model.fingerprints["checkpoint"], [text_digest(one) for one in texts], *settings])


def _now() -> datetime:
    return datetime.now(timezone.utc)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _reason(error: Exception) -> str:
    """First line of what a database said."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    return (str(cause).splitlines() or [type(cause).__name__])[0]


def _taken(name: str | None) -> Conflict:
    return Conflict(f"the name '{name}' is taken by another memory: update that one, or take another name")


def _check_name(name: str) -> None:
    """Refuse names that could be mistaken for an id, a filter or an option."""
    good = 0 < len(name) <= 200 and name.isprintable() and name == name.strip() and "*" not in name and name[0] != "-"
    require("a name", name, good and not _ID.fullmatch(name), "printable, up to 200 characters, without *, and no id")


def _version(memory: Memory, data: bytes) -> Version:
    """What a version says of itself; its number is the database's to give."""
    from ..memory import stored_precision

    written = memory.parts
    if not written or len({record.checkpoint for record in written}) != 1:
        raise GradmemError("a store keeps memories of text, written by one checkpoint")
    require("the size of a memory", len(data), len(data) <= LARGEST, f"at most {LARGEST:,} bytes")
    losses = [loss for record in written for loss in (record.loss_before, record.loss_after)]
    if any(map(math.isnan, losses)):  # SQLite would keep it as NULL
        raise GradmemError("the memory's write losses are no numbers (NaN): it was not written well")
    tokens = [len(record.token_losses) for record in written]
    mean = partial(_mean, weights=tokens)
    return Version(
        number=0,
        created=_now(),
        precision=stored_precision(data),
        rows=len(memory),
        tokens=sum(tokens),
        kept=sum(tokens) - sum(len(record.lost) for record in written),
        loss_before=mean([record.loss_before for record in written]),
        loss_after=mean([record.loss_after for record in written]),
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )


def _mean(values: Sequence[float], weights: Sequence[int]) -> float:
    return round(sum(value * weight for value, weight in zip(values, weights, strict=True)) / max(1, sum(weights)), 6)


def _make_version(values: Sequence[Any]) -> Version:
    return Version(**{column.name: value for column, value in zip(_VERSION, values, strict=True)})


def _make_entry(row: Sequence[Any]) -> Entry:
    about = {column.name: value for column, value in zip(_ENTRY, row[: len(_ENTRY)], strict=True)}
    *version, tags = row[len(_ENTRY) :]
    return Entry(**about, tags=tuple(labels(tags or "")), current=_make_version(version))


def _insert_version(connection: Connection, memory: Mapping[str, Any], version: Version, data: bytes) -> None:
    about = {**asdict(version), "memory": memory["id"], "number": memory["version"]}
    connection.execute(insert(db.versions).values(**about, data=data))


def _insert_tags(connection: Connection, memory: Mapping[str, Any], tags: Sequence[str]) -> None:
    about = {"memory": memory["id"], "owner": memory["owner"], "created": memory["created"]}
    if tags:
        connection.execute(insert(db.tags), [{**about, "tag": tag} for tag in tags])
