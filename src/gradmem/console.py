"""What all commands share: the console, progress, files and devices."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from .errors import GradmemError

console = Console()


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
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise GradmemError(f"standard input is not UTF-8 text: {error.reason}") from error


def device_named(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise GradmemError(f"no device '{name}' here: {str(error).splitlines()[0]}") from error
    return device


def progress_bar(batches: Iterable[Any], title: str, total: int | None = None) -> Iterable[Any]:
    quiet = Console(stderr=True)
    return track(batches, title, total, console=quiet, transient=True, disable=not quiet.is_terminal)


def dumps(value: Any) -> str:
    return json.dumps(value, indent=1)
