"""What keeps a store in order."""

from __future__ import annotations

import os

from . import database as db
from .migrations import HEAD
from .session import Session
from .transaction import Quota


def upgrade(location: str | os.PathLike[str] | None = None) -> str:
    """Bring the tables of a store up to date. All other processes that use the store must have ended.

    A SQLite file needs no call: it is upgraded when it is opened.

    Parameters
    ----------
    location : str or path, optional
        As in `Store`.

    Returns
    -------
    str
        Version of the tables.

    Raises
    ------
    Missing
        If there is no store.
    GradmemError
        If a newer gradmem made it, or as in `Store`.
    """
    Session.connect(db.locate(location), None, Quota(), create=False, upgrade=True).engine.dispose()
    return HEAD
