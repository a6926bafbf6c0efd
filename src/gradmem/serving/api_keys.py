"""API keys: who they belong to, and hashes of them. No key itself is kept."""

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
"""How long a process waits for others that change the same file."""
Rows = dict[str, dict[str, str]]
"""Hash of the key and time, by owner."""
_OWNER = re.compile(r"[\w.@-]{1,100}", re.ASCII)


class Keys:
    """Owners and the SHA-256 of their keys, in one file that only its user reads.

    A key is 256 random bits, so that its hash cannot be guessed back. An owner who gets a key again after `remove`
    owns the same memories. Processes that change the file take turns, under a lock on a file beside it.

    Parameters
    ----------
    path : path, optional
        By default `GRADMEM_KEYS`, or else a file in the user's data directory.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        default = Path(platformdirs.user_data_dir("gradmem"), "keys.json")
        self.path = Path(path or os.environ.get("GRADMEM_KEYS") or default)
        self._parsed: bytes | None = None
        self._kept: Rows = {}

    def owners(self) -> dict[str, str]:
        """Owners, with the times at which they got their keys."""
        return {owner: about["created"] for owner, about in self._rows().items()}

    def owner(self, key: str) -> str | None:
        """Whose key it is; None where it is nobody's. Keys that were added or removed since are known."""
        sought = _hash(key)
        found = None
        for owner, about in self._rows().items():
            if secrets.compare_digest(about["sha256"], sought):
                found = owner
        return found

    def add(self, owner: str) -> str:
        """Make a key, which is shown this once.

        Raises
        ------
        GradmemError
            When the owner has one, or its name is none.
        """
        good = _OWNER.fullmatch(owner) is not None
        require("an owner", owner, good, "up to 100 letters, digits and any of . _ @ -")
        with self._changed() as rows:
            if owner in rows:
                raise GradmemError(f"'{owner}' has a key: remove it first")
            key = PREFIX + secrets.token_urlsafe(32)
            rows[owner] = {"sha256": _hash(key), "created": f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}"}
        return key

    def remove(self, owner: str) -> None:
        """Forget an owner's key; memories stay in the store.

        Raises
        ------
        Missing
            When there is none.
        """
        with self._changed() as rows:
            if rows.pop(owner, None) is None:
                raise Missing(f"'{owner}' has no key")

    @contextmanager
    def _changed(self) -> Iterator[Rows]:
        """The rows as they are now, to be changed, and saved while no other process does the same."""
        lock = self.path.with_name(self.path.name + ".lock")
        try:
            lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with FileLock(lock, BUSY_SECONDS, PRIVATE):
                rows = dict(self._rows())
                yield rows
                write_bytes(self.path, json.dumps(rows, indent=1).encode(), PRIVATE)
        except Timeout as error:
            raise Unavailable(f"another process has changed {self.path} for {BUSY_SECONDS} s: try again") from error
        except OSError as error:
            raise Unavailable(f"cannot write {self.path}: {error.strerror or error}") from error

    def _rows(self) -> Rows:
        """The rows of the file as it is now."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise Unavailable(f"cannot read {self.path}: {error.strerror or error}") from error
        if data != self._parsed:  # its time would not tell: two changes may fall into one tick of the clock
            try:
                rows = json.loads(data)
                self._kept = {owner: {k: str(row[k]) for k in ("sha256", "created")} for owner, row in rows.items()}
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                raise Unavailable(f"{self.path} is damaged or no file of keys") from error
            self._parsed = data
        return self._kept


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()
