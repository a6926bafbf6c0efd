"""The texts of the tool `memory`: what it shows of files, and how it edits them.

The messages are those of Anthropic's memory tool, `memory_20250818`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ..errors import GradmemError

ROOT = "/memories"
"""The directory of all files."""
MOST_LINES = 999_999
DEPTH = 2
"""Levels of directories that a listing shows."""
AROUND = 2
"""Lines before and after an edit that the answer shows."""


def is_path(ref: str) -> bool:
    """Whether the name of a memory is a path of a file or a directory."""
    return ref == ROOT or ref.startswith(ROOT + "/")


def checked_path(path: str) -> str:
    """Return a path without a slash at its end.

    Raises
    ------
    GradmemError
        If it does not stay below `ROOT`.
    """
    shown, path = path, path.rstrip("/")
    if not is_path(path):
        raise GradmemError(f"Error: Path must start with {ROOT}, got: {shown}")
    if {"", ".", ".."} & set(path.split("/")[1:]):
        raise GradmemError(f"Error: Path {shown} would escape {ROOT} directory")
    return path


def listing(path: str, sizes: Mapping[str, int]) -> str:
    """List files and directories up to two levels deep, each with its size.

    Parameters
    ----------
    path : str
        The directory.
    sizes : mapping
        Bytes of each file below it, by path.
    """
    shown = {path: sum(sizes.values())}
    for file, size in sorted(sizes.items()):
        parts = file[len(path) + 1 :].split("/")
        for depth, part in enumerate(parts[:DEPTH], 1):
            if part.startswith(".") or part == "node_modules":
                break
            here = "/".join([path, *parts[:depth]]) + "/" * (depth < len(parts))
            shown[here] = shown.get(here, 0) + size
    head = f"Here're the files and directories up to 2 levels deep in {path}, excluding hidden items and node_modules:"
    return "\n".join([head, *(f"{_size(size)}\t{name}" for name, size in shown.items())])


def _size(count: float) -> str:
    """Return bytes in the unit that fits them."""
    unit = "B"
    for larger in "KMG":
        if count < 1024:
            break
        count, unit = count / 1024, larger
    return f"{count:.1f}".removesuffix(".0") + unit


def content(path: str, text: str, lines: Sequence[int] | None = None) -> str:
    """Show a file with line numbers.

    Parameters
    ----------
    path, text : str
    lines : sequence of int, optional
        First and last line. -1 is the last line of the file.

    Raises
    ------
    GradmemError
        If the file has too many lines.
    """
    found = text.split("\n")
    if len(found) > MOST_LINES:
        raise GradmemError(f"File {path} exceeds maximum line limit of {MOST_LINES:,} lines.")
    first, last = lines or (1, -1)
    first = max(1, first)
    shown = found[first - 1 : len(found) if last == -1 else last]
    return f"Here's the content of {path} with line numbers:\n{_numbered(shown, first)}"


def _numbered(lines: Sequence[str], first: int) -> str:
    return "\n".join(f"{number:6}\t{line}" for number, line in enumerate(lines, first))


def replaced(path: str, text: str, old: str, new: str) -> tuple[str, int]:
    """Replace the only occurrence of a string.

    Returns
    -------
    tuple of str and int
        The new text, and the line in which the string began.

    Raises
    ------
    GradmemError
        If there is none, or more than one.
    """
    lines = [text.count("\n", 0, found.start()) + 1 for found in re.finditer(re.escape(old), text)] if old else []
    if not lines:
        raise GradmemError(f"No replacement was performed, old_str `{old}` did not appear verbatim in {path}.")
    if len(lines) > 1:
        raise GradmemError(
            f"No replacement was performed. Multiple occurrences of old_str `{old}` in lines: "
            f"{', '.join(map(str, lines))}. Please ensure it is unique"
        )
    return text.replace(old, new), lines[0]


def snippet(text: str, line: int) -> str:
    """Show the lines around an edit."""
    first = max(1, line - AROUND)
    shown = _numbered(text.split("\n")[first - 1 : line + AROUND], first)
    return f"The memory file has been edited. Here is the snippet showing the change (with line numbers):\n{shown}"


def inserted(text: str, line: int, more: str) -> str:
    """Insert text after a line; 0 is the beginning of the file.

    Raises
    ------
    GradmemError
        If there is no such line.
    """
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    if not 0 <= line <= len(lines):
        raise GradmemError(
            f"Error: Invalid `insert_line` parameter: {line}. It should be within the range of lines of the file: "
            f"[0, {len(lines)}]"
        )
    lines.insert(line, more.rstrip("\n"))
    return "\n".join(lines) + "\n"
