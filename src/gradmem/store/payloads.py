"""Payloads outside the database: each large memory file is an object in a folder or in object storage.

The database is the truth. An object is written before the row that names it, is never changed, and has a name that no
other object ever has. So an object without a row may be removed, and a row without its object is an error.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import GradmemError, Unavailable
from ..files import PRIVATE, write_bytes

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

LARGE = 2**16
"""Fewest bytes of a payload that becomes an object; smaller ones stay in the database."""
BATCH = 1000
"""Most objects that are removed at once."""
_DAY = "%Y-%m-%d"


@dataclass(frozen=True)
class Payload:
    """The bytes of a memory file, and the name of the object that has them, unless they belong into the row."""

    data: bytes
    object: str | None = None


class Payloads:
    """The objects at one place.

    Parameters
    ----------
    url : str
        Folder: a URL that fsspec opens.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def where(self, name: str) -> str:
        """Return the URL of an object."""
        return f"{self.url}/{name}"

    def write(self, data: bytes) -> str:
        """Write an object, and return its name: the day, and 128 random bits."""
        name = f"{datetime.now(timezone.utc):{_DAY}}/{secrets.token_hex(16)}"
        with self._opened("write", name) as (system, path):
            if _local(system):
                _write_file(Path(path), data)
            else:
                system.pipe_file(path, data)
        return name

    def read(self, name: str) -> bytes:
        """Return the bytes of an object.

        Raises
        ------
        FileNotFoundError
            If there is no such object.
        """
        with self._opened("read", name) as (system, path):
            return bytes(system.cat_file(path))

    def remove(self, names: Sequence[str]) -> None:
        """Remove objects as far as possible: `upkeep.clean` finds the others."""
        for first in range(0, len(names), BATCH):
            with suppress(Exception), self._opened("remove", "") as (system, path):
                system.rm([f"{path}/{name}" for name in names[first : first + BATCH]])

    def old(self) -> Iterator[list[str]]:
        """Yield the names of objects that were written two days ago or earlier, so that none waits for its row."""
        with self._opened("list", "") as (system, path):
            for folder in sorted(system.ls(path, detail=False) if system.exists(path) else ()):
                day = folder.rstrip("/").rpartition("/")[2]
                with suppress(ValueError):
                    if datetime.now(timezone.utc).date() - datetime.strptime(day, _DAY).date() < timedelta(days=2):
                        continue
                    names = [f"{day}/{one.rpartition('/')[2]}" for one in system.ls(folder, detail=False)]
                    yield from (names[first : first + BATCH] for first in range(0, len(names), BATCH))

    @contextmanager
    def _opened(self, action: str, name: str) -> Iterator[tuple[AbstractFileSystem, str]]:
        """Open the place, and raise its errors, whatever they are, as one line."""
        from fsspec.core import url_to_fs

        where = self.where(name).rstrip("/")
        try:
            system, path = url_to_fs(where)
            yield system, path
        except GradmemError:
            raise
        except ImportError as error:
            raise GradmemError(f"cannot {action} {where}: a package is missing: {error}") from error
        except Exception as error:  # each kind of storage has its own
            if isinstance(error, FileNotFoundError) and action == "read":
                raise
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
            raise Unavailable(f"cannot {action} {where}: {reason}") from error


def _local(system: AbstractFileSystem) -> bool:
    return "file" in ((system.protocol,) if isinstance(system.protocol, str) else system.protocol)


def _write_file(path: Path, data: bytes) -> None:
    """Write a file so that it is on the disk when this returns, its name too."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_bytes(path, data, PRIVATE)
    for folder in (path.parent, path.parent.parent):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
