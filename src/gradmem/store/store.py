"""The store: memories of one owner in one database."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from typing_extensions import Unpack

from ..choices import Precision
from ..errors import Conflict, require
from . import database as db
from .content import content_hash
from .entries import Changes, Diff, Entry, Version
from .listing import Filters, bounded, labels, matching
from .payloads import LARGE
from .rows import check_name, version_of
from .session import Session
from .transaction import Quota

if TYPE_CHECKING:
    from ..memory import Memory
    from ..model import BoundMemory, MemoryModel

PAGE = 1000
"""Most memories of one page of a listing."""


class Store:
    """Memories in one database. Each has an id, and may have a name and tags.

    Every change is a transaction: when a method returns, its change is on the disk, and if the process is killed before
    that, nothing has changed. Several processes may read and write one store at the same time.

    Parameters
    ----------
    location : str or path, optional
        SQLite file, or URL (`sqlite:///FILE`, `postgresql://USER@HOST/DATABASE`). By default `GRADMEM_STORE`, or a file
        in the user's data directory.
    owner : str, optional
        Owner of the memories. A store shows and stores the memories of one owner only. By default the local user.
    create : bool
        Whether to create the store if there is none.
    max_memories, max_bytes : int, optional
        Most memories of each owner, and most bytes of their files with all versions. By default unlimited.

    Raises
    ------
    GradmemError
        If the store cannot be opened, is something else, or was made by a newer gradmem. All methods raise it if the
        database fails.
    """

    def __init__(
        self,
        location: str | os.PathLike[str] | None = None,
        owner: str | None = None,
        *,
        create: bool = True,
        max_memories: int | None = None,
        max_bytes: int | None = None,
    ) -> None:
        for name, limit in (("max_memories", max_memories), ("max_bytes", max_bytes)):
            require(name, limit, limit is None or limit > 0, "above 0")
        self._session = Session.connect(db.locate(location), owner, Quota(max_memories, max_bytes), create)

    def __repr__(self) -> str:
        return f"Store({self._session.location!r})"

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections, also those of `owned_by`."""
        self._session.engine.dispose()

    @property
    def shared(self) -> Session | None:
        """The database, if servers on several machines can use it together: PostgreSQL. None for an SQLite file."""
        return self._session if self._session.engine.dialect.name == "postgresql" else None

    def owned_by(self, owner: str | None) -> Store:
        """Return the same store for another owner, over the same connections."""
        view = copy.copy(self)
        view._session = self._session.owned_by(owner)
        return view

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
        """Write a text, or the chunks of one, into a memory and store it.

        A text that was stored before, by the same checkpoint with the same steps and precision, is not written again.

        Parameters
        ----------
        model : MemoryModel
        text : str or sequence of str
        steps, until, max_steps, options
            As in `MemoryModel.write`.
        precision : {"float32", "float16", "int8"}
            Precision of the stored file.
        name : str, optional
            A memory that is stored already gets this name if it has none.
        tags : str or sequence of str
            Tags, in one string separated by commas. A memory that is stored already gets them besides its own.

        Returns
        -------
        Entry
            Entry of the memory, new or stored before.

        Raises
        ------
        GradmemError
            If another memory has the name, or the memory is stored already under another name.
        """
        texts = [text] if isinstance(text, str) else list(text)
        content = content_hash(model, texts, steps, until, max_steps, precision)
        if entry := self.reuse(content, name=name, tags=tags):
            return entry
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
        """Store a memory. The same memory is stored only once.

        Parameters
        ----------
        memory : Memory or bytes
            The bytes of a memory file are stored as they are.
        name, tags
            As in `write`.
        precision : {"float32", "float16", "int8"}
            Precision in which a `Memory` is stored.
        content : str, optional
            `content_hash` of what was written. By default a hash of the memory itself.

        Raises
        ------
        GradmemError
            If the bytes are not a memory file, the memory has no receipts, or another memory has the name.
        """
        from ..memory import Memory, identity

        data = memory if isinstance(memory, bytes) else memory.to_bytes(precision)
        loaded = Memory.from_bytes(data) if isinstance(memory, bytes) else memory
        content = content or identity(data)
        check_name(name)
        wanted = labels(tags)
        if len(data) >= LARGE and (found := self.reuse(content, name=name, tags=wanted)):
            return found
        payload = self._session.payload(data)
        with self._session.transaction(writes=True) as transaction:
            found = transaction.reuse(content, name, wanted)
            return found or transaction.insert(loaded, payload, content, name, wanted)

    def reuse(self, content: str, *, name: str | None = None, tags: str | Sequence[str] = ()) -> Entry | None:
        """Find a stored memory by its `content_hash`, and give it a name and tags as `write` does.

        Returns
        -------
        Entry or None
            None if there is no such memory, but there is room for it.

        Raises
        ------
        GradmemError
            As in `write`, and if the quota has no room for another memory.
        """
        check_name(name)
        wanted = labels(tags)
        with self._session.transaction(writes=True) as transaction:
            if entry := transaction.reuse(content, name, wanted):
                return entry
            transaction.check_room(size=1, memories=1)
            return None

    def get(self, ref: str) -> Entry:
        """Return the entry of a memory.

        Parameters
        ----------
        ref : str
            Id or name, as in all methods.

        Raises
        ------
        Missing
            If there is no such memory, as in all methods.
        """
        with self._session.transaction() as transaction:
            return transaction.entry(ref)

    def read(self, ref: str, version: int | None = None) -> bytes:
        """Return the bytes of a memory file, by default of the current version, after checking their SHA-256.

        Raises
        ------
        GradmemError
            If there is no such memory or version, or its bytes are damaged.
        """
        return self._session.read(ref, version)[1]

    def load(self, ref: str, version: int | None = None) -> Memory:
        """Load a memory without its model; see `read`."""
        from ..memory import Memory

        return Memory.from_bytes(self.read(ref, version), f"memory '{ref}'")

    def open(self, ref: str, version: int | None = None, checkpoint: str | None = None) -> BoundMemory:
        """Load a memory with the checkpoint that wrote it, ready to be asked; see `gradmem.open`."""
        from ..model.loading import bind_memory

        return bind_memory(self.load(ref, version), f"memory '{ref}'", checkpoint)

    def list(self, *, limit: int = 50, after: str | None = None, **filters: Unpack[Filters]) -> Sequence[Entry]:
        """List one page of the memories that match all filters: the newest first, or by name for a name with *.

        Parameters
        ----------
        limit : int
            Most memories of the page, up to 1,000.
        after : str, optional
            `Entry.cursor` of the last memory of the previous page.
        filters
            `checkpoint` (name or fingerprint), `name` (a name, or its beginning followed by *), `tags` (a memory must
            have all of them), `since` and `until` (times of creation, `until` excluded, UTC if they have no time zone).

        Raises
        ------
        GradmemError
            If the limit or the cursor is invalid, or several filters take too long: many memories match each, and few
            match all.
        """
        require("limit", limit, 1 <= limit <= PAGE, f"from 1 to {PAGE}")
        with self._session.transaction() as transaction, bounded(transaction.connection):
            page = matching(transaction.connection, self._session.owner, filters, after).limit(limit)
            return transaction.page(transaction.connection.scalars(page).all())

    def change(self, ref: str, **changes: Unpack[Changes]) -> Entry:
        """Change the name, the tags and the pin of a memory. If one change is refused, none is made.

        Parameters
        ----------
        ref : str
        changes
            `name` (None removes it), `tags` (they replace the present ones), and `pinned` (a pinned memory cannot be
            deleted). Whatever is not given stays as it is.

        Raises
        ------
        GradmemError
            If there is no such memory, the name is invalid or another memory has it, or a tag is invalid.
        """
        name, wanted = changes.get("name"), labels(changes.get("tags", ()))
        check_name(name)
        with self._session.transaction(writes=True) as transaction:
            row = transaction.row(ref)
            transaction.check_free(name, row.id)
            if "tags" in changes:
                transaction.replace_tags(row, wanted)
            if changes:
                columns = {column: changes[column] for column in ("name", "pinned") if column in changes}
                transaction.set_columns(row.id, **columns)
            return transaction.entry(row.id)

    def rename(self, ref: str, name: str | None) -> Entry:
        """Give a memory another name, or None to remove it; see `change`."""
        return self.change(ref, name=name)

    def pin(self, ref: str, pinned: bool = True) -> Entry:
        """Pin a memory, so that it cannot be deleted, or unpin it."""
        return self.change(ref, pinned=pinned)

    def tag(self, ref: str, tags: str | Sequence[str]) -> Entry:
        """Replace the tags of a memory."""
        return self.change(ref, tags=tags)

    def delete(self, *refs: str) -> int:
        """Delete memories with all their versions, and return their number. If one is refused, none is deleted.

        Raises
        ------
        GradmemError
            If there is no such memory, or one is pinned.
        """
        with self._session.transaction(writes=True) as transaction:
            rows = {row.id: row for row in map(transaction.row, refs)}
            for row in rows.values():
                if row.pinned:
                    raise Conflict(f"memory '{row.name or row.id}' is pinned: unpin it first")
            return transaction.delete(db.memories.c.id.in_(rows))

    def prune(self, **filters: Unpack[Filters]) -> int:
        """Delete all unpinned memories that match all filters, and return their number. See `list`."""
        with self._session.transaction(writes=True) as transaction:
            matches = matching(transaction.connection, self._session.owner, filters).order_by(None)
            return transaction.delete(db.memories.c.id.in_(matches) & db.memories.c.pinned.is_(False))

    def update(
        self, ref: str, memory: Memory, *, precision: Precision | None = None, expected: int | None = None
    ) -> Entry:
        """Store a memory as the next version of another, and make it the current one.

        Parameters
        ----------
        ref : str
        memory : Memory
        precision : {"float32", "float16", "int8"}, optional
            By default that of the current version.
        expected : int, optional
            Version that `memory` was made from. The update is refused if another version has become current.

        Raises
        ------
        GradmemError
            If there is no such memory, another checkpoint wrote it, or another version is current.
        """
        entry = self.get(ref)  # used by its id from here on: the name may move to another memory
        data = memory.to_bytes(precision or entry.current.precision)
        version = version_of(memory, data)
        if entry.checkpoint != memory.receipts[0].checkpoint:
            raise Conflict(f"all versions of a memory need one checkpoint; '{ref}' was written by '{entry.model}'")
        payload = self._session.payload(data)
        with self._session.transaction(writes=True) as transaction:
            row = transaction.row(entry.id)
            if expected not in (None, row.version):
                raise Conflict(f"'{ref}' has changed meanwhile: version {row.version} is current, not {expected}")
            transaction.add_version(row, version, payload)
            return transaction.entry(row.id)

    def append(self, ref: str, text: str | Sequence[str], model: MemoryModel, **options: Any) -> Entry:
        """Write more text into a memory, and store it as the next version.

        Parameters
        ----------
        ref : str
        text, options
            As in `MemoryModel.append`.
        model : MemoryModel
            The model that wrote the memory.

        Raises
        ------
        GradmemError
            If the memory has changed meanwhile, or as in `MemoryModel.append`.
        """
        entry = self.get(ref)
        memory = model.bind(self.load(entry.id, entry.current.number), f"memory '{ref}'")
        longer = model.append(memory, text, **options)
        return self.update(entry.id, longer, expected=entry.current.number)

    def versions(self, ref: str) -> Sequence[Version]:
        """Return all versions of a memory, the first one first."""
        with self._session.transaction() as transaction:
            return transaction.versions(ref)

    def rollback(self, ref: str, version: int) -> Entry:
        """Make another version the current one. No version is deleted, so later ones can be restored the same way."""
        with self._session.transaction(writes=True) as transaction:
            row = transaction.row(ref)
            transaction.make_current(row, version)
            return transaction.entry(row.id)

    def diff(self, ref: str, a: int, b: int) -> Diff:
        """Compare by their receipts which tokens two versions keep."""
        from ..memory import Memory

        id = self.get(ref).id
        (before, old), (after, new) = (self._session.read(id, number) for number in (a, b))
        receipts = [Memory.from_bytes(data, f"memory '{ref}'").receipts for data in (old, new)]
        return Diff.of(before, after, (receipts[0], receipts[1]))
