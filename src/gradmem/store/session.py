"""How an owner reaches the database: connections, transactions, and one-line errors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from sqlalchemy.engine import URL, Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from ..errors import Unavailable, require
from . import database as db
from .entries import Version
from .payloads import LARGE, Payload, Payloads
from .transaction import Quota, Transaction


@dataclass(frozen=True)
class Session:
    """A connected database, seen by one owner.

    Attributes
    ----------
    url : URL
    engine : Engine
    owner : str
        Empty for the local user.
    quota : Quota
    """

    url: URL
    engine: Engine
    owner: str
    quota: Quota

    @classmethod
    def connect(cls, url: URL, owner: str | None, quota: Quota, create: bool, upgrade: bool = False) -> Session:
        """Connect to a database; `create` and `upgrade` are those of `database.connect`."""
        with _translate_errors(url):
            return cls(url, db.connect(url, create, upgrade), _checked(owner), quota)

    def owned_by(self, owner: str | None) -> Session:
        """Return the same session for another owner."""
        return replace(self, owner=_checked(owner))

    @property
    def location(self) -> str:
        """The file or the URL, without a password."""
        return _location(self.url)

    @contextmanager
    def transaction(self, writes: bool = False) -> Iterator[Transaction]:
        """Run a transaction, which takes effect as a whole or not at all. Those that write for one owner take turns."""
        options = {db.WRITER: self.owner if writes else None}
        with (
            _translate_errors(self.url),
            self.engine.connect().execution_options(**options) as connection,
            connection.begin(),
        ):
            transaction = Transaction(connection, self.owner, self.location, self.quota)
            yield transaction
        if transaction.removed and (payloads := self.payloads()):
            payloads.remove(transaction.removed)

    def payloads(self) -> Payloads | None:
        """Return the place of large payloads, or None if they are in the database."""
        with self.transaction() as transaction:
            return transaction.payloads()

    def payload(self, data: bytes) -> Payload:
        """Write a large payload as an object, unless its place is the database. The row must come after this."""
        payloads = self.payloads() if len(data) >= LARGE else None
        return Payload(data, payloads.write(data) if payloads else None)

    def read(self, ref: str, version: int | None) -> tuple[Version, bytes]:
        """Return a version, by default the current one, and its bytes, after checking their SHA-256."""
        with self.transaction() as transaction:
            found, payload = transaction.read(ref, version)
            payloads = transaction.payloads() if payload.object else None
        data = payload.data
        damaged = f"memory '{ref}' is damaged in {self.location}"
        if payload.object:
            try:
                data = payloads.read(payload.object) if payloads else b""
            except FileNotFoundError as error:
                with self.transaction() as transaction:
                    transaction.read(ref, version)  # raises `Missing` if the memory has been deleted meanwhile
                where = payloads.where(payload.object) if payloads else ""
                raise Unavailable(f"{damaged}: its payload {where} is missing") from error
        if not isinstance(data, bytes) or hashlib.sha256(data).hexdigest() != found.sha256:
            raise Unavailable(f"{damaged}: it does not match its checksum")
        return found, data


def _checked(owner: str | None) -> str:
    require("owner", owner, owner != "", "a name, or None for the local user")
    return owner or ""


def _location(url: URL) -> str:
    return url.render_as_string() if url.host else str(url.database)


@contextmanager
def _translate_errors(url: URL) -> Iterator[None]:
    """Raise errors of the database as one line."""
    try:
        yield
    except (SQLAlchemyError, OSError, ValueError) as error:
        raise Unavailable(f"cannot use the store {_location(url)}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    cause = error.orig if isinstance(error, DBAPIError) else error
    return (str(cause).splitlines() or [type(cause).__name__])[0]
