"""Text files in a store: each is kept as text, and has the memory that was written from this text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from sqlalchemy import ColumnElement, delete, func, insert, or_, select, update

from ..errors import Conflict, Missing, require
from . import database as db
from .entries import Entry
from .rows import check_name, now
from .transaction import Transaction

if TYPE_CHECKING:
    from ..memory import Memory
    from .store import Store

LONGEST = 2**20
"""Most bytes of the text of a file."""
_files = db.files.c


@dataclass(frozen=True)
class TextFile:
    """A text file.

    Attributes
    ----------
    path : str
        Names of directories and of the file, each after a slash.
    text : str
    memory : str or None
        Id of the memory that was written from this text. None if there is none yet.
    """

    path: str
    text: str
    memory: str | None


class TextFiles:
    """The text files of a store's owner.

    A directory exists as long as there is a file in it. The memory of a file has the file's path as its name. It is
    deleted when the text changes, so that no answer comes from a text that is gone.

    Parameters
    ----------
    store : Store
    """

    def __init__(self, store: Store) -> None:
        self._session = store._session

    def sizes(self, path: str) -> dict[str, int]:
        """Return the bytes of the file at a path, or of all files below it, by their paths in alphabetical order."""
        with self._session.transaction() as transaction:
            query = select(_files.path, _files.size).where(_below(transaction, path)).order_by(_files.path)
            return {row.path: row.size for row in transaction.connection.execute(query)}

    def read(self, path: str) -> Sequence[TextFile]:
        """Return the file at a path, or all files below it in alphabetical order.

        Raises
        ------
        Missing
            If there is none.
        """
        with self._session.transaction() as transaction:
            query = select(*_COLUMNS).where(_below(transaction, path)).order_by(_files.path)
            found = [TextFile(*row) for row in transaction.connection.execute(query)]
        if not found:
            raise Missing(f"the path {path} does not exist")
        return found

    def create(self, path: str, text: str) -> None:
        """Store a new file.

        Raises
        ------
        Conflict
            If the path exists, or a directory of it is a file.
        GradmemError
            If the path or the text is invalid, or the quota has no room for the file.
        """
        size = _checked(path, text)
        with self._session.transaction(writes=True) as transaction:
            _check_free(transaction, path, f"File {path} already exists")
            transaction.take_room(size, memories=1)
            moment = now()
            values = {"owner": transaction.owner, "path": path, "text": text, "size": size}
            transaction.connection.execute(insert(db.files).values(**values, created=moment, updated=moment))

    def edit(self, path: str, change: Callable[[str], str]) -> str:
        """Replace the text of a file by what `change` makes of it, and return the new text.

        Raises
        ------
        Missing
            If there is no such file.
        Conflict
            If the memory of the file is pinned.
        GradmemError
            If the text is invalid, or the quota has no room for it.
        """
        with self._session.transaction(writes=True) as transaction:
            at = _at(transaction, path)
            row = transaction.connection.execute(select(_files.text, _files.size).where(at)).first()
            if row is None:
                raise Missing(f"the path {path} does not exist")
            text = change(row.text)
            size = _checked(path, text)
            transaction.take_room(size - row.size)
            _delete_memories(transaction, at)
            values = {"text": text, "size": size, "updated": now()}
            transaction.connection.execute(update(db.files).where(at).values(**values))
        return text

    def delete(self, path: str) -> int:
        """Delete a file, or all files below a path, with their memories; return their number.

        Raises
        ------
        Missing
            If there is none.
        Conflict
            If a memory is pinned.
        """
        with self._session.transaction(writes=True) as transaction:
            below = _below(transaction, path)
            _delete_memories(transaction, below)
            sizes = transaction.connection.scalars(delete(db.files).where(below).returning(_files.size)).all()
            if not sizes:
                raise Missing(f"the path {path} does not exist")
            transaction.take_room(-sum(sizes), -len(sizes))
        return len(sizes)

    def rename(self, old: str, new: str) -> None:
        """Move a file, or all files below a path, with their memories.

        Raises
        ------
        Missing
            If there is none at the old path.
        Conflict
            If the new path exists or is inside the old one, or a directory of it is a file.
        GradmemError
            If a new path is invalid.
        """
        with self._session.transaction(writes=True) as transaction:
            query = select(_files.path, _files.memory).where(_below(transaction, old))
            moved = {row.path: row.memory for row in transaction.connection.execute(query)}
            if not moved:
                raise Missing(f"the path {old} does not exist")
            if new.startswith(old + "/"):
                raise Conflict(f"{old} cannot be moved into itself")
            _check_free(transaction, new, f"The destination {new} already exists")
            for path, memory in moved.items():
                target = new + path[len(old) :]
                _check_path(target)
                values = {"path": target, "updated": now()}
                transaction.connection.execute(update(db.files).where(_at(transaction, path)).values(**values))
                if memory is not None:
                    transaction.check_free(target, memory)
                    transaction.set_columns(memory, name=target)

    def keep(self, file: TextFile, memory: Memory) -> Entry:
        """Store the memory that was written from a file.

        Raises
        ------
        Conflict
            If the file has changed meanwhile, or another memory has its path as a name.
        """
        payload = self._session.payload(memory.to_bytes())
        with self._session.transaction(writes=True) as transaction:
            at = _at(transaction, file.path)
            row = transaction.connection.execute(select(_files.text, _files.memory).where(at)).first()
            if row is None or row.text != file.text:
                raise Conflict(f"{file.path} has changed meanwhile: try again")
            _delete_memories(transaction, at)
            transaction.check_free(file.path, None)
            entry = transaction.insert(memory, payload, None, file.path, (), memories=0)
            transaction.connection.execute(update(db.files).where(at).values(memory=entry.id))
            return entry


_COLUMNS = [_files[field.name] for field in fields(TextFile)]


def _at(transaction: Transaction, path: str) -> ColumnElement[bool]:
    """Condition: the file at a path."""
    return (_files.owner == transaction.owner) & (_files.path == path)


def _below(transaction: Transaction, path: str) -> ColumnElement[bool]:
    """Condition: the file at a path, or a file below it. Paths are compared as ranges of the index."""
    directory = path + "/"
    after = path + chr(ord("/") + 1)
    inside = (_files.path >= directory) & (_files.path < after)
    return (_files.owner == transaction.owner) & or_(_files.path == path, inside)


def _check_free(transaction: Transaction, path: str, message: str) -> None:
    """Raise `Conflict` if a path exists, or a directory of it is a file."""
    if transaction.connection.scalar(select(func.count()).where(_below(transaction, path))):
        raise Conflict(message)
    parents = [path[:at] for at, character in enumerate(path) if character == "/" and at]
    taken = select(_files.path).where(_files.owner == transaction.owner, _files.path.in_(parents))
    if (file := transaction.connection.scalar(taken)) is not None:
        raise Conflict(f"{file} is a file, not a directory")


def _delete_memories(transaction: Transaction, which: ColumnElement[bool]) -> None:
    """Delete the memories of files."""
    written = select(_files.memory).where(which, _files.memory.is_not(None))
    own = db.memories.c.id.in_(written)
    pinned = select(db.memories.c.name).where(own, db.memories.c.pinned.is_(True))
    if (name := transaction.connection.scalar(pinned)) is not None:
        raise Conflict(f"the memory of {name} is pinned: unpin it first")
    transaction.delete(own)


def _checked(path: str, text: str) -> int:
    """Check the path and the text of a file, and return the bytes of the text."""
    _check_path(path)
    require("the text of a file", text[:20], "\0" not in text, "text without NUL characters")
    size = len(text.encode())
    require("the size of a file", size, size <= LONGEST, f"at most {LONGEST:,} bytes")
    return size


def _check_path(path: str) -> None:
    check_name(path)
    parts = path.split("/")
    good = parts[0] == "" and len(parts) > 1 and not {"", ".", ".."} & set(parts[1:])
    require("a path", path, good, "names, each after a slash")
