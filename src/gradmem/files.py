"""Files and directories: written whole or not at all, private where they must be, known by their SHA-256."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from .errors import GradmemError

PRIVATE = 0o600
"""Mode of a file that only its owner may read and write."""


def write_bytes(path: Path, data: bytes, mode: int = 0o666) -> Path:
    """Write a file under a temporary name beside it, then rename it into place; missing directories are created.

    Parameters
    ----------
    path : Path
    data : bytes
    mode : int
        Permissions of the file, before the process's umask.

    Raises
    ------
    GradmemError
        If the file cannot be written; an existing file is then unchanged.
    """
    temporary = _beside(path)
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


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Fill a new directory beside `target`, which replaces `target` when the block ends without an error.

    After an error the new directory is removed, and `target` is as it was. Two processes may do this at the same time:
    one of the two directories stays.

    Parameters
    ----------
    target : Path

    Yields
    ------
    Path
        The directory to fill.

    Raises
    ------
    OSError
        If the directory cannot be created or renamed.
    """
    temporary = _beside(target)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in filter(Path.is_file, temporary.rglob("*")):
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        _replace(target, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(target: Path, directory: Path) -> None:
    """Put a finished directory in the place of another, or of none."""
    old = _beside(target)
    with suppress(FileNotFoundError):
        target.rename(old)
    try:
        directory.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was faster, which is as good
            raise
    shutil.rmtree(old, ignore_errors=True)


def _beside(path: Path) -> Path:
    """A temporary name that nothing else has, in the same directory."""
    return path.parent / f".{secrets.token_hex(8)}.tmp"


def cache_directory() -> Path:
    """Directory of what can be made or downloaded again: `GRADMEM_CACHE`, or `gradmem` in the user's cache."""
    given = os.environ.get("GRADMEM_CACHE")
    return Path(given) if given else user_cache_path("gradmem")


def digest_files(paths: Iterable[Path]) -> list[str]:
    """SHA-256 of each file.

    Raises
    ------
    GradmemError
        If a file cannot be read.
    """
    digests = []
    for path in paths:
        try:
            with path.open("rb") as file:
                digest = hashlib.sha256()
                while part := file.read(1 << 20):
                    digest.update(part)
            digests.append(digest.hexdigest())
        except OSError as error:
            raise GradmemError(f"cannot read {path}: {error.strerror or error}") from error
    return digests


def make_private(file: Path) -> None:
    """Create an empty file that only its owner may read, and missing directories; an existing file is unchanged.

    Raises
    ------
    OSError
        If it cannot be created.
    """
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with suppress(FileExistsError):
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE))


def close_to_others(file: Path) -> None:
    """Make a file private if everybody may read it; a file that only a group may read stays as it is."""
    with suppress(OSError):  # it is not there, or another user's
        if file.stat().st_mode & 0o007:
            file.chmod(PRIVATE)


def save_json(rows: Sequence[dict[str, Any]] | dict[str, Any], path: Path) -> Path:
    """Save rows as a JSON list, or other plain data."""
    return write_bytes(path, json.dumps(rows, indent=1).encode())


def save_csv(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Save rows as a CSV table; a column that a row does not have is empty in it."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return write_bytes(path, text.getvalue().encode())
