"""Reading data from local files or from a data set on the hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import GradmemError


def is_hub(data: str) -> bool:
    """Whether `data` names a data set on the hub (`owner/name`) rather than a local file or directory.

    Raises
    ------
    GradmemError
        If it is neither.
    """
    if Path(data).exists():
        return False
    if data.count("/") == 1 and not data.startswith((".", "/", "~")):
        return True
    raise GradmemError(f"no data at {data}: give an existing file or directory, or a data set of the hub as owner/name")


def hub_rows(data: str, split: str, config: str | None = None) -> Any:
    """Return the rows of a split of a data set on the hub, as a `datasets.Dataset`.

    Raises
    ------
    GradmemError
        If the `datasets` package is missing, or the data set cannot be loaded.
    """
    try:
        import datasets
    except ImportError as error:
        raise GradmemError(
            f"'{data}' is no local file or directory, and data sets of the hub need a package: pip install datasets"
        ) from error
    try:
        return datasets.load_dataset(data, config, split=split)
    except Exception as error:  # the hub's client, pyarrow and the system each raise their own
        raise GradmemError(f"cannot load '{data}' from the hub: {error}") from error


def find_file(directory: Path, pattern: str, what: str) -> Path:
    """Return the only file in a directory that matches a pattern; `what` says in messages what it is for.

    Raises
    ------
    GradmemError
        If there is none, or more than one.
    """
    found = sorted(directory.glob(pattern))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise GradmemError(f"{directory} must have one file {pattern} for {what}; found: {names}")
    return found[0]


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Read the lines of a UTF-8 text file, with their numbers from 1 and without line ends.

    Raises
    ------
    GradmemError
        If the file cannot be read or is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield number, line.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise GradmemError(f"{path} line {number} is not UTF-8 text: {error.reason}") from error
    except OSError as error:
        raise GradmemError(f"cannot read {path}: {error.strerror or error}") from error


def held_out(count: int, one_in: int) -> int:
    """Number of training samples that are held out for validation: one in so many, at least one."""
    return max(1, count // one_in) if count > 1 else 0
