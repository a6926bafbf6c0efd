"""API keys: who they belong to, and hashes of them. No key itself is kept."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from datetime import datetime, timezone
from pathlib import Path

import platformdirs

from ..errors import GradmemError, Missing, require
from ..files import write_bytes

PREFIX = "gm-"
_OWNER = re.compile(r"[\w.@-]{1,100}", re.ASCII)


class Keys:
    """Owners and the SHA-256 of their keys, in one file that only its user reads.

    A key is 256 random bits, so that its hash cannot be guessed back. An owner who gets a key again after `remove`
    owns the same memories.

    Parameters
    ----------
    path : path, optional
        By default `GRADMEM_KEYS`, or else a file in the user's data directory.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        default = Path(platformdirs.user_data_dir("gradmem"), "keys.json")
        self.path = Path(path or os.environ.get("GRADMEM_KEYS") or default)
        self._read_at: int | None = None
        self._kept: dict[str, dict[str, str]] = {}

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
        rows = dict(self._rows())
        if owner in rows:
            raise GradmemError(f"'{owner}' has a key: remove it first")
        key = PREFIX + secrets.token_urlsafe(32)
        rows[owner] = {"sha256": _hash(key), "created": f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}"}
        self._save(rows)
        return key

    def remove(self, owner: str) -> None:
        """Forget an owner's key; memories stay in the store.

        Raises
        ------
        Missing
            When there is none.
        """
        rows = dict(self._rows())
        if rows.pop(owner, None) is None:
            raise Missing(f"'{owner}' has no key")
        self._save(rows)

    def _save(self, rows: dict[str, dict[str, str]]) -> None:
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise GradmemError(f"cannot write {self.path}: {error.strerror or error}") from error
        old = os.umask(0o077)
        try:
            write_bytes(self.path, json.dumps(rows, indent=1).encode())
        finally:
            os.umask(old)

    def _rows(self) -> dict[str, dict[str, str]]:
        """The file, read again where it has changed."""
        try:
            changed = self.path.stat().st_mtime_ns
            if changed != self._read_at:
                rows = json.loads(self.path.read_text())
                self._kept = {
                    str(owner): {k: str(row[k]) for k in ("sha256", "created")} for owner, row in rows.items()
                }
                self._read_at = changed
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise GradmemError(f"{self.path} is damaged or no file of keys") from error
        return self._kept


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()
