"""The one exception type for mistakes that a user can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GradmemError(Exception):
    """A problem that the caller can fix; its message says how. The command line prints it and exits with 2."""


class Missing(GradmemError):
    """There is no such memory, or no store to find it in."""


class Conflict(GradmemError):
    """What is kept already stands against it: a name that is taken, a pin, another version."""


class Unavailable(GradmemError):
    """The database fails, or has lost what was stored: nothing that the one who asks could mend."""


def unknown(kind: str, name: str, known: Iterable[str]) -> GradmemError:
    """Build the error for a name that does not exist, with the nearest existing one."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return GradmemError(f"unknown {kind} '{name}': {hint}known: {', '.join(names) or 'none'}")


def require(name: str, value: object, good: bool, wanted: str) -> None:
    """Raise `GradmemError` for an option whose value is not `good`, saying what is wanted."""
    if not good:
        raise GradmemError(f"{name} must be {wanted}, not {value!r}")
