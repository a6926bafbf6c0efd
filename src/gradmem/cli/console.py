"""What all commands share: the console, progress and files."""

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
WIDE = 200
"""Columns of what is piped, where a program or a file takes whole table cells rather than a screen's width."""
EVERY = 10.0
"""Seconds between the lines that show progress where no terminal could show a bar."""


class Console(rich.Console):
    """A console of rich that shows text as it is: nothing in it is markup, an emoji's name or what a terminal obeys."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render(self, renderable: rich.RenderableType, options: rich.ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as rich does, what it renders being visible; what moves the cursor is rich's own."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


def _console(stderr: bool = False) -> Console:
    """As wide as its terminal, or wide enough for whole cells where it is piped."""
    found = Console(stderr=stderr)
    return found if found.is_terminal else Console(stderr=stderr, width=max(found.width, WIDE))


console = _console()
notes = _console(stderr=True)
"""Standard error: what is not the result."""


def use_utf8() -> None:
    """Take and give text as UTF-8 whatever the locale says, as files are read and written."""
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
        When it cannot be read or is not UTF-8.
    """
    if str(path) == "-":
        return read_stdin()
    try:
        return path.read_bytes().decode()  # line ends as they are: a memory is of the text to the letter
    except UnicodeDecodeError as error:
        raise GradmemError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise GradmemError(f"cannot read {path}: {error.strerror or error}") from error


def read_stdin() -> str:
    """Read all of standard input.

    Raises
    ------
    GradmemError
        When it is closed, cannot be read or is not UTF-8.
    """
    if sys.stdin is None or sys.stdin.closed:
        raise GradmemError("standard input is closed: give a file, or text on standard input")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise GradmemError(f"standard input is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise GradmemError(f"cannot read standard input: {error.strerror or error}") from error


def progress_bar(
    batches: Iterable[T],
    title: str = "",
    total: int | None = None,
    *,
    stop: Interruptible | None = None,
    detail: Callable[[T], str] | None = None,
) -> Iterator[T]:
    """Pass on what is done step by step and show how far it is: a bar on a terminal, a line now and then elsewhere.

    Parameters
    ----------
    batches : iterable
    title : str
    total : int, optional
    stop : Interruptible, optional
        End with the step at hand when this was asked to.
    detail : callable, optional
        What else to show of a step.
    """
    if total is None and isinstance(batches, Sized):
        total = len(batches)
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[detail]}")]
    bar = Progress(
        *columns,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=notes,
        transient=True,
        disable=not notes.is_terminal,
    )
    said = time.monotonic()
    with bar:
        task = bar.add_task(title, total=total, detail="")
        for done, batch in enumerate(batches, 1):
            shown = detail(batch) if detail else ""
            bar.update(task, completed=done, detail=shown)
            if not notes.is_terminal and time.monotonic() - said >= EVERY:
                said = time.monotonic()
                of = "" if total is None else f" of {total}"
                notes.print(f"{title}: {done}{of} {shown}".rstrip(), highlight=False, soft_wrap=True)
            yield batch
            if stop:
                return


def dumps(value: Any) -> str:
    return json.dumps(value, indent=1)
