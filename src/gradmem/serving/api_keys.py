"""API keys: their owners and their hashes. The keys themselves are not stored."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout

from ..errors import GradmemError, Missing, Unavailable, require
from ..files import PRIVATE, write_bytes

PREFIX = "gm-"
BUSY_SECONDS = 60
"""Most seconds that a process waits for others that change the same file."""
Rows = dict[str, dict[str, str]]
"""Hash of the key and time of its creation, by owner."""
_OWNER = re.compile(r"[\w.@-]{1,100}", re.ASCII)


class ApiKeys:
    """Owners and the SHA-256 hashes of their keys, in one file that only its user can read.

    A key has 256 random bits, so that it cannot be guessed from its hash. An owner who gets a new key after `remove`
    owns the same memories. Processes that change the file take turns: they lock a file beside it.

    Parameters
    ----------
    path : path, optional
        By default `GRADMEM_KEYS`, or a file in the user's data directory.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        default = Path(platformdirs.user_data_dir("gradmem"), "keys.json")
        self.path = Path(path or os.environ.get("GRADMEM_KEYS") or default)
        self._parsed: bytes | None = None
        self._cached: Rows = {}

    def owners(self) -> dict[str, str]:
        """Return the owners, and the times at which their keys were made."""
        return {owner: row["created"] for owner, row in self._rows().items()}

    def owner(self, key: str) -> str | None:
        """Return the owner of a key, or None. Changes by other processes are seen at once."""
        sought = _hash(key)
        found = None
        for owner, row in self._rows().items():
            if secrets.compare_digest(row["sha256"], sought):
                found = owner
        return found

    def add(self, owner: str) -> str:
        """Make a key for an owner. It cannot be shown again later.

        Raises
        ------
        GradmemError
            If the owner has a key already, or the name of the owner is invalid.
        """
        valid = _OWNER.fullmatch(owner) is not None
        require("an owner", owner, valid, "up to 100 letters, digits and any of . _ @ -")
        with self._changed() as rows:
            if owner in rows:
                raise GradmemError(f"'{owner}' has a key already: remove it first")
            key = PREFIX + secrets.token_urlsafe(32)
            rows[owner] = {"sha256": _hash(key), "created": f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}"}
        return key

    def remove(self, owner: str) -> None:
        """Delete the key of an owner. The memories stay in the store.

        Raises
        ------
        Missing
            If the owner has no key.
        """
        with self._changed() as rows:
            if rows.pop(owner, None) is None:
                raise Missing(f"'{owner}' has no key")

    @contextmanager
    def _changed(self) -> Iterator[Rows]:
        """Let the caller change the rows under a lock, and save them."""
        lock = self.path.with_name(self.path.name + ".lock")
        try:
            lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with FileLock(lock, BUSY_SECONDS, PRIVATE):
                rows = dict(self._rows())
                yield rows
                write_bytes(self.path, json.dumps(rows, indent=1).encode(), PRIVATE)
        except Timeout as error:
            raise Unavailable(f"another process has locked {self.path} for {BUSY_SECONDS} s: try again") from error
        except OSError as error:
            raise Unavailable(f"cannot write {self.path}: {error.strerror or error}") from error

    def _rows(self) -> Rows:
        """Read the rows, and parse them if the file has changed."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise Unavailable(f"cannot read {self.path}: {error.strerror or error}") from error
        if data != self._parsed:  # the time of the file is not enough: two changes may fall into one tick of the clock
            try:
                rows = json.loads(data)
                self._cached = {owner: {k: str(row[k]) for k in ("sha256", "created")} for owner, row in rows.items()}
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                raise Unavailable(f"{self.path} is damaged or not a file of keys") from error
            self._parsed = data
        return self._cached


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()
