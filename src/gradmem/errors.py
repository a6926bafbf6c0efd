"""The one exception type for mistakes that a user can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from .visible import visible

LONGEST = 2000
"""Characters of a message: what files and requests hold may stand in it, and they may be of any length."""
QUOTED = 100
"""Characters of a wrong value or name that a message repeats."""
SHOWN = 300
"""Characters of another library's message that are shown."""


class GradmemError(Exception):
    """A problem that the caller can fix; its message says how. The command line prints it and exits with 2.

    A message may quote a file or a request: it holds nothing that a terminal obeys, and is no longer than `LONGEST`.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(_clipped(visible(message), LONGEST))


class Missing(GradmemError):
    """There is no such memory, or no store to find it in."""


class Conflict(GradmemError):
    """What is kept already stands against it: a name that is taken, a pin, another version."""


class QuotaExceeded(GradmemError):
    """An owner keeps as much as they may: the message says how much that is, and what to do."""


class Unavailable(GradmemError):
    """The database fails, or has lost what was stored: nothing that the one who asks could mend."""


def unknown(kind: str, name: str, known: Iterable[str]) -> GradmemError:
    """Build the error for a name that does not exist, with the nearest existing one."""
    names, name = sorted(known), _clipped(name, QUOTED)  # the nearest of a long one would take minutes to find
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return GradmemError(f"unknown {kind} '{name}': {hint}known: {', '.join(names) or 'none'}")


def require(name: str, value: object, good: bool, wanted: str) -> None:
    """Raise `GradmemError` for an option whose value is not `good`, saying what is wanted."""
    if not good:
        raise GradmemError(f"{name} must be {wanted}, not {_clipped(repr(value), QUOTED)}")


def _clipped(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "\N{HORIZONTAL ELLIPSIS}"


def reason(error: BaseException) -> str:
    """First line of what an error says, not too long."""
    return _clipped((str(error).strip().splitlines() or [type(error).__name__])[0], SHOWN)


@contextmanager
def refused(what: str) -> Iterator[None]:
    """Raise `GradmemError` for every error inside: libraries raise errors of any kind over files that others made."""
    try:
        yield
    except GradmemError:
        raise
    except BaseException as error:
        # A panic of a library in Rust, as `tokenizers`, is a BaseException without a class to import.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise GradmemError(f"{what}: {reason(error)}") from error
