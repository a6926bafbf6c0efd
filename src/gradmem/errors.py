"""Exceptions for problems that a user can fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from .visible import visible

LONGEST = 2000
"""Most characters of a message: it may quote files and requests, which may be of any length."""
QUOTED = 100
"""Most characters of a wrong value or name in a message."""
SHOWN = 300
"""Most characters of another library's message."""


class GradmemError(Exception):
    """A problem that the caller can fix; the message says how. The command line prints it and exits with code 2.

    A message may quote files and requests: control characters in it are replaced, and it has at most `LONGEST`
    characters.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(_clipped(visible(message), LONGEST))


class Missing(GradmemError):
    """The memory does not exist, or the store does not."""


class Conflict(GradmemError):
    """The change conflicts with what is stored: a name is taken, a memory is pinned, or a newer version exists."""


class QuotaExceeded(GradmemError):
    """An owner has reached the limit of stored data; the message says what it is and what to do."""


class Unavailable(GradmemError):
    """The database fails, or has lost data. The caller cannot fix this."""


def unknown(kind: str, name: str, known: Iterable[str]) -> GradmemError:
    """Build the error for a name that does not exist; it suggests the most similar name."""
    names, name = sorted(known), _clipped(name, QUOTED)  # to compare a very long name takes minutes
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return GradmemError(f"unknown {kind} '{name}': {hint}known: {', '.join(names) or 'none'}")


def require(name: str, value: object, good: bool, wanted: str) -> None:
    """Raise `GradmemError` if the value of an option is not `good`; `wanted` says which values are."""
    if not good:
        raise GradmemError(f"{name} must be {wanted}, not {_clipped(repr(value), QUOTED)}")


def _clipped(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "\N{HORIZONTAL ELLIPSIS}"


def reason(error: BaseException) -> str:
    """Return the first line of an error's message, shortened."""
    return _clipped((str(error).strip().splitlines() or [type(error).__name__])[0], SHOWN)


@contextmanager
def refused(what: str) -> Iterator[None]:
    """Turn every error in the block into a `GradmemError`: libraries raise all kinds of errors for damaged files."""
    try:
        yield
    except GradmemError:
        raise
    except BaseException as error:
        # A panic in a Rust library, such as `tokenizers`, is a BaseException whose class cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise GradmemError(f"{what}: {reason(error)}") from error
