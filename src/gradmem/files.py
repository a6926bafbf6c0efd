"""Files that are written whole or not at all."""

from __future__ import annotations

import csv
import io
import json
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import GradmemError

PRIVATE = 0o600
"""Mode of files that only their user reads."""


def cache_directory() -> Path:
    """Return the directory of what can be made again: `GRADMEM_CACHE`, or `gradmem` in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("GRADMEM_CACHE") or Path(base) / "gradmem")


def write_bytes(path: Path, data: bytes, mode: int = 0o666) -> Path:
    """Write a file under a temporary name beside it, then rename it into place; directories on its way are made.

    Parameters
    ----------
    path : Path
    data : bytes
    mode : int
        Who may read and write it, less what the process's umask takes away.

    Raises
    ------
    GradmemError
        When it cannot be written; an existing file is then untouched.
    """
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise GradmemError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def make_private(file: Path) -> None:
    """Make an empty file that only its user reads, and directories on its way; one that is there is left alone.

    Raises
    ------
    OSError
        When it cannot be made.
    """
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with suppress(FileExistsError):
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE))


def close_to_others(file: Path) -> None:
    """Take a file that everybody may read from all but its user; one that was opened to a group only stays so."""
    with suppress(OSError):  # it is not there, or another user's
        if file.stat().st_mode & 0o007:
            file.chmod(PRIVATE)


def save_json(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Save rows as a JSON list."""
    return write_bytes(path, json.dumps(rows, indent=1).encode())


def save_csv(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Save rows as a CSV table; a column that a row does not have is empty in it."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return write_bytes(path, text.getvalue().encode())
