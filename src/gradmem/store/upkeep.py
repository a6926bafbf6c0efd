"""What keeps a store in order: upgrades of its tables, the place of large payloads, and objects that no memory has."""

from __future__ import annotations

import os
from pathlib import Path

from sqlalchemy import delete, insert, select

from ..errors import Conflict
from . import database as db
from .migrations import HEAD
from .payloads import Payloads
from .session import Session
from .store import Store
from .transaction import PAYLOADS, Quota


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


def place_of_payloads(store: Store) -> str | None:
    """Return the URL where large payloads are stored, or None if they are in the database."""
    payloads = store._session.payloads()
    return payloads.url if payloads else None


def place_payloads(store: Store, url: str) -> str:
    """Store large payloads outside the database from now on. Those that are in the database stay there.

    Parameters
    ----------
    store : Store
    url : str
        Folder: a path, or a URL that fsspec opens. If payloads are elsewhere already, they must have been copied here.

    Returns
    -------
    str
        The URL, which every process that opens the store uses from now on.

    Raises
    ------
    GradmemError
        If nothing can be written there, or payloads that the store has are not there.
    """
    place = Payloads(url if "://" in url else f"file://{Path(url).expanduser().absolute()}")
    trial = place.write(b"trial")
    with store._session.transaction(writes=True) as transaction:
        named = db.versions.c.object
        newest = transaction.connection.scalar(select(named).where(named.is_not(None)).order_by(named.desc()).limit(1))
        for name in filter(None, (trial, newest)):
            try:
                place.read(name)
            except FileNotFoundError as error:
                raise Conflict(f"{place.where(name)} is missing: copy the payloads of the store there first") from error
        transaction.connection.execute(delete(db.settings).where(db.settings.c.name == PAYLOADS))
        transaction.connection.execute(insert(db.settings).values(name=PAYLOADS, value=place.url))
    place.remove([trial])
    return place.url


def clean(store: Store) -> int:
    """Remove the objects that no memory has, written two days ago or earlier, and return their number.

    A process that was killed may leave one, and so may storage that did not answer when a memory was deleted.
    """
    removed, named = 0, db.versions.c.object
    if (place := store._session.payloads()) is None:
        return removed
    for names in place.old():
        with store._session.transaction() as transaction:
            kept = set(transaction.connection.scalars(select(named).where(named.in_(names))))
        orphans = [name for name in names if name not in kept]
        place.remove(orphans)
        removed += len(orphans)
    return removed
