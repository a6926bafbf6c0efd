"""The store: one object over one database, seen by one owner."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import delete
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from typing_extensions import Unpack

from ..choices import Precision
from ..errors import Conflict, Unavailable, require
from ..receipts import text_digest
from . import database as db
from .entries import Changes, Diff, Entry, Version
from .listing import Filters, labels, matching
from .rows import check_name, version_of
from .transaction import Quota, Transaction

if TYPE_CHECKING:
    from ..memory import Memory
    from ..model import MemoryModel

PAGE = 1000
"""Most memories of one page of a listing."""


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
    max_memories, max_bytes : int, optional
        Most memories that each owner may keep, and most bytes of their files, versions among them. By default as many
        as there is room for.

    Raises
    ------
    GradmemError
        When it cannot be opened, is something else, or was made by a newer gradmem. All methods raise it when the
        database fails.
    """

    def __init__(
        self,
        place: str | os.PathLike[str] | None = None,
        owner: str | None = None,
        *,
        create: bool = True,
        max_memories: int | None = None,
        max_bytes: int | None = None,
    ) -> None:
        require("owner", owner, owner != "", "a name, or None for the local user")
        for what, most in (("max_memories", max_memories), ("max_bytes", max_bytes)):
            require(what, most, most is None or most > 0, "above 0")
        self._owner = owner or ""
        self._quota = Quota(max_memories, max_bytes)
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
        check_name(name)
        wanted = labels(tags)
        with self._transaction(writes=True) as its:
            return its.kept(content, name, wanted) or its.insert(loaded, data, content, name, wanted)

    def known(self, content: str, *, name: str | None = None, tags: str | Sequence[str] = ()) -> Entry | None:
        """Find what is kept already and give it name and tags, as `write`; or make sure that there is room for it.

        Parameters
        ----------
        content : str
            What was written and how; see `content_of`.

        Raises
        ------
        GradmemError
            As `write`.
        """
        check_name(name)
        wanted = labels(tags)
        with self._transaction(writes=True) as its:
            if entry := its.kept(content, name, wanted):
                return entry
            its.check_room(size=1, memories=1)
            return None

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
        with self._transaction() as its:
            return its.entry(ref)

    def read(self, ref: str, version: int | None = None) -> bytes:
        """The bytes of a memory file, by default of the current version; their checksum has been verified.

        Raises
        ------
        GradmemError
            When there is no such memory or version, or its bytes are not those that were stored.
        """
        with self._transaction() as its:
            return its.stored(ref, version)[1]

    def load(self, ref: str, version: int | None = None) -> Memory:
        """A memory, bound to no model; see `read`."""
        from ..memory import Memory

        return Memory.from_bytes(self.read(ref, version), f"memory '{ref}'")

    def open(self, ref: str, version: int | None = None, checkpoint: str | None = None) -> Memory:
        """A memory bound to the checkpoint that wrote it, ready to be asked; see `gradmem.open`."""
        from ..model.loading import bind_memory

        return bind_memory(self.load(ref, version), f"memory '{ref}'", checkpoint)

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
        with self._transaction() as its:
            page = matching(its.connection, self._owner, filters, after).limit(limit)
            return its.entries(db.memories.c.id.in_(page))

    # Changing

    def change(self, ref: str, **changes: Unpack[Changes]) -> Entry:
        """Change what is said of a memory: all that is given or, where one thing is refused, nothing.

        Parameters
        ----------
        ref : str
        changes
            `name` (None takes it away), `tags` in place of those it has, and `pinned`, which keeps it from being
            deleted. What is not given stays.

        Raises
        ------
        GradmemError
            When there is no such memory, the name is taken or none, or a tag is none.
        """
        name, wanted = changes.get("name"), labels(changes.get("tags", ()))
        check_name(name)
        with self._transaction(writes=True) as its:
            row = its.row(ref)
            its.check_free(name, row.id)
            if "tags" in changes:
                its.retag(row, wanted)
            if changes:
                its.set(row.id, **{what: changes[what] for what in ("name", "pinned") if what in changes})
            return its.entry(row.id)

    def rename(self, ref: str, name: str | None) -> Entry:
        """Give a memory another name, or none; see `change`."""
        return self.change(ref, name=name)

    def pin(self, ref: str, pinned: bool = True) -> Entry:
        """Keep a memory from being deleted, or no longer do."""
        return self.change(ref, pinned=pinned)

    def tag(self, ref: str, tags: str | Sequence[str]) -> Entry:
        """Give a memory these tags in place of those it has."""
        return self.change(ref, tags=tags)

    def delete(self, *refs: str) -> int:
        """Delete memories with all their versions, all of them or, where one is refused, none; return how many.

        Raises
        ------
        GradmemError
            When there is no such memory, or one is pinned.
        """
        with self._transaction(writes=True) as its:
            rows = {row.id: row for row in map(its.row, refs)}
            for row in rows.values():
                if row.pinned:
                    raise Conflict(f"memory '{row.name or row.id}' is pinned: unpin it first")
            its.connection.execute(delete(db.memories).where(db.memories.c.id.in_(rows)))
        return len(rows)

    def prune(self, **filters: Unpack[Filters]) -> int:
        """Delete all memories that match all filters, but for pinned ones; return how many. See `list`."""
        with self._transaction(writes=True) as its:
            ids = db.memories.c.id.in_(matching(its.connection, self._owner, filters).order_by(None))
            done = its.connection.execute(delete(db.memories).where(ids, db.memories.c.pinned.is_(False)))
        return done.rowcount

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
        with self._transaction(writes=True) as its:
            row = its.row(ref)
            data = memory.to_bytes(precision or its.entry(row.id).current.precision)
            version = version_of(memory, data)
            if row.checkpoint != memory.receipts[0].checkpoint:
                raise Conflict(f"all versions of a memory are by one checkpoint; '{ref}' is by '{row.model}'")
            if expected not in (None, row.version):
                raise Conflict(f"'{ref}' has changed meanwhile: version {row.version} is current, not {expected}")
            its.add_version(row, version, data)
            return its.entry(row.id)

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
        with self._transaction() as its:
            return its.versions(ref)

    def rollback(self, ref: str, version: int) -> Entry:
        """Make another version the current one. None is deleted: a later one can come back in the same way."""
        with self._transaction(writes=True) as its:
            row = its.row(ref)
            its.make_current(row, version)
            return its.entry(row.id)

    def diff(self, ref: str, a: int, b: int) -> Diff:
        """What became of version a's tokens in version b, by their receipts."""
        from ..memory import Memory

        with self._transaction() as its:
            id = its.row(ref).id
            (before, old), (after, new) = (its.stored(id, number) for number in (a, b))
        receipts = [Memory.from_bytes(data, f"memory '{ref}'").receipts for data in (old, new)]
        return Diff.of(before, after, (receipts[0], receipts[1]))

    # The database

    @property
    def _place(self) -> str:
        return self._url.render_as_string() if self._url.host else str(self._url.database)

    @contextmanager
    def _transaction(self, writes: bool = False) -> Iterator[Transaction]:
        """A transaction, which takes place as a whole or not at all; those that write for one owner take turns."""
        options = {db.WRITER: self._owner if writes else None}
        with self._told(), self._engine.connect().execution_options(**options) as connection, connection.begin():
            yield Transaction(connection, self._owner, self._place, self._quota)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Say in one line what is wrong with the database."""
        try:
            yield
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
    settings = [model.overrides, model.most_steps(steps, until, max_steps), until, precision]
    return _hash([model.fingerprints["checkpoint"], [text_digest(one) for one in texts], *settings])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _reason(error: Exception) -> str:
    """First line of what a database said."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    return (str(cause).splitlines() or [type(cause).__name__])[0]
