"""The console, progress bars, and text files of all commands."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from pathlib import Path
from typing import Any, TypeVar

from rich import console as rich
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment

from ..errors import GradmemError
from ..interruption import Interruptible
from ..visible import visible

T = TypeVar("T")
PIPE_WIDTH = 200
"""Least width of output that is not a terminal, so that table cells are not wrapped."""
PROGRESS_SECONDS = 10.0
"""Seconds between lines of progress if standard error is not a terminal."""


class Console(rich.Console):
    """A console that prints text literally: no markup, no emoji names, no control characters."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render(self, renderable: rich.RenderableType, options: rich.ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as rich does, and make control characters visible, except those of rich itself."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


def _console(stderr: bool = False) -> Console:
    """Make a console with the width of its terminal, or of `PIPE_WIDTH`."""
    found = Console(stderr=stderr)
    return found if found.is_terminal else Console(stderr=stderr, width=max(found.width, PIPE_WIDTH))


console = _console()
notes = _console(stderr=True)
"""Console on standard error, for all that is not the result of a command."""


def use_utf8() -> None:
    """Use UTF-8 for standard input and output, whatever the locale is."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if stream is None:
            continue  # closed
        errors = "strict" if stream is sys.stdin else "backslashreplace"
        stream.reconfigure(encoding="utf-8", errors=errors)  # type: ignore[union-attr]
    if sys.stdin is not None:
        sys.stdin.reconfigure(newline="")  # type: ignore[union-attr]


def read_text(path: Path) -> str:
    """Read a text file, or standard input for `-`.

    Raises
    ------
    GradmemError
        If the file cannot be read or is not UTF-8.
    """
    if str(path) == "-":
        return read_stdin()
    try:
        return path.read_bytes().decode()  # bytes, since a memory is of the exact text with its line ends
    except UnicodeDecodeError as error:
        raise GradmemError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise GradmemError(f"cannot read {path}: {error.strerror or error}") from error


def read_stdin() -> str:
    """Read all of standard input.

    Raises
    ------
    GradmemError
        If standard input is closed, cannot be read or is not UTF-8.
    """
    if sys.stdin is None or sys.stdin.closed:
        raise GradmemError("standard input is closed: give a file, or text on standard input")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise GradmemError(f"standard input is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise GradmemError(f"cannot read standard input: {error.strerror or error}") from error


def new_bar(**options: Any) -> Progress:
    """Make a bar on standard error, drawn on a terminal only. Its tasks have a field `detail`: text beside the bar."""
    columns = [
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
    return Progress(*columns, console=notes, disable=not notes.is_terminal, **options)


def progress_bar(
    batches: Iterable[T],
    title: str = "",
    total: int | None = None,
    *,
    stop: Interruptible | None = None,
    detail: Callable[[T], str] | None = None,
) -> Iterator[T]:
    """Yield the items of an iterable and show the progress: a bar on a terminal, or a line now and then.

    Parameters
    ----------
    batches : iterable
    title : str
    total : int, optional
    stop : Interruptible, optional
        Stops after the current item if the user has interrupted.
    detail : callable, optional
        Text to show beside the bar for an item.
    """
    if total is None and isinstance(batches, Sized):
        total = len(batches)
    printed = time.monotonic()
    with new_bar(transient=True) as bar:
        task = bar.add_task(title, total=total, detail="")
        for done, batch in enumerate(batches, 1):
            shown = detail(batch) if detail else ""
            bar.update(task, completed=done, detail=shown)
            if not notes.is_terminal and time.monotonic() - printed >= PROGRESS_SECONDS:
                printed = time.monotonic()
                of = "" if total is None else f" of {total}"
                notes.print(f"{title}: {done}{of} {shown}".rstrip(), highlight=False, soft_wrap=True)
            yield batch
            if stop:
                return


def dumps(value: Any) -> str:
    """Return a value as indented JSON."""
    return json.dumps(value, indent=1)
