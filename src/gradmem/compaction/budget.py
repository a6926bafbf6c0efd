"""How much of a key-value cache to keep."""

from __future__ import annotations

import re

from ..errors import GradmemError

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
LEAST = 8
"""Entries of a head, on average, that a fraction of a short text keeps at least: with fewer, names come out wrong."""
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmg]?)b", re.IGNORECASE)


def entries_of(budget: float | str, length: int, bytes_of_entry: int) -> float:
    """Entries of each head, on average, that a budget allows.

    Parameters
    ----------
    budget : float or str
        Up to 1: a fraction of the cache. Above 1: a number of entries. A text such as 200KB or 2MB: bytes.
    length : int
        Entries of the whole cache, for each head.
    bytes_of_entry : int
        Bytes that one entry takes in all heads of all layers.

    Raises
    ------
    GradmemError
        If this is no budget, or less than one entry.
    """
    if isinstance(budget, str):
        found = SIZE.fullmatch(budget.strip())
        if not found:
            raise GradmemError(f"budget must be a number, or bytes such as 200KB or 2MB, not '{budget}'")
        entries = float(found[1]) * UNITS[found[2].lower()] / bytes_of_entry
    elif budget > 0:
        entries = budget * length if budget <= 1 else float(budget)
    else:
        raise GradmemError(f"budget must be above 0, not {budget}")
    if entries < 1:
        least = f"{bytes_of_entry:,} bytes" if isinstance(budget, str) else f"{1 / length:.2g} of this text's cache"
        raise GradmemError(f"a budget of {budget} is less than one entry for each head: give at least {least}")
    return min(entries, float(length))


def enough(budget: float | str, length: int) -> float | str:
    """Raise a fraction of a short text to a number of entries that answers; leave other budgets as they are.

    Parameters
    ----------
    budget : float or str
        As for `entries_of`.
    length : int
        Entries of the whole cache, for each head.
    """
    least = float(min(LEAST, length))
    if isinstance(budget, str) or not 0 < budget <= 1 or budget * length >= least:
        return budget
    return least
