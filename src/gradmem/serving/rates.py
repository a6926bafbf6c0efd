"""Limits on the number of requests: counted in this process, or in the database that several servers share."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage, Storage
from limits.strategies import FixedWindowRateLimiter
from sqlalchemy import text

from ..errors import Unavailable
from ..store import Store
from ..store.session import Session
from .http_errors import Refused

# Nothing in the table is worth keeping: it is neither logged nor a part of the store's tables, and any server makes it.
SECONDS = 5.0
"""Most seconds that a request waits to be counted."""
_LOCK = 0x72617465
"""Key of the PostgreSQL lock under which one server makes the table."""
TABLE = """
CREATE UNLOGGED TABLE IF NOT EXISTS gradmem_rates
(client VARCHAR PRIMARY KEY, hits BIGINT NOT NULL, ends TIMESTAMP WITH TIME ZONE NOT NULL)
"""
HIT = """
INSERT INTO gradmem_rates AS r (client, hits, ends)
VALUES (:client, :amount, clock_timestamp() + make_interval(secs => :seconds))
ON CONFLICT (client) DO UPDATE SET
hits = CASE WHEN r.ends <= clock_timestamp() THEN excluded.hits ELSE r.hits + excluded.hits END,
ends = CASE WHEN r.ends <= clock_timestamp() THEN excluded.ends ELSE r.ends END
RETURNING hits
"""
FOUND = "SELECT hits, EXTRACT(EPOCH FROM ends - clock_timestamp()) FROM gradmem_rates WHERE client = :client"
FORGET = """
DELETE FROM gradmem_rates WHERE client IN (
SELECT client FROM gradmem_rates WHERE ends < clock_timestamp() FOR UPDATE SKIP LOCKED)
"""


class Rates:
    """Counts the requests of each client, by the minute that begins with its first one.

    Parameters
    ----------
    limit : int
        Most requests of a client in a minute.
    store : Store, optional
        If it is on PostgreSQL, all servers that use it count together.
    """

    def __init__(self, limit: int, store: Store | None = None) -> None:
        session = store.shared if store is not None else None
        self._item = RateLimitItemPerMinute(limit)
        self._limiter = FixedWindowRateLimiter(MemoryStorage() if session is None else SharedCounters(session))
        self._threads = None if session is None else ThreadPoolExecutor(2, "gradmem-rate")

    async def check(self, client: str) -> None:
        """Count a request, and raise `Refused` if it is one too many."""
        if self._threads is None:
            wait = self._count(client)
        else:
            counting = asyncio.get_running_loop().run_in_executor(self._threads, self._count, client)
            try:
                wait = await asyncio.wait_for(counting, SECONDS)
            except asyncio.TimeoutError as error:
                raise Unavailable(f"the database has not counted a request within {SECONDS} s") from error
        if wait is not None:
            raise Refused(429, f"more than {self._item.amount} requests in a minute", retry_after=wait)

    def _count(self, client: str) -> float | None:
        """Count a request; return the seconds until the client may come again, or None if it may be served."""
        if self._limiter.hit(self._item, client):
            return None
        return self._limiter.get_window_stats(self._item, client).reset_time - time.time()


class SharedCounters(Storage):
    """Counters of `limits` in a table of PostgreSQL, by the clock of the database.

    Parameters
    ----------
    session : Session
    """

    STORAGE_SCHEME = None

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session
        with session.transaction() as transaction:
            transaction.connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
            transaction.connection.execute(text(TABLE))

    @property
    def base_exceptions(self) -> type[Exception]:
        """What a counter raises if the database fails."""
        return Unavailable

    def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        """Count, and return the number in the client's present window. Its first one removes windows that are over."""
        with self._session.transaction() as transaction:
            counted = {"client": key, "amount": amount, "seconds": expiry}
            hits = int(transaction.connection.scalar(text(HIT), counted) or 0)
        if hits == amount:
            with self._session.transaction() as transaction:
                transaction.connection.execute(text(FORGET))
        return hits

    def get(self, key: str) -> int:
        """Return the number in the client's present window."""
        return self._found(key)[0]

    def get_expiry(self, key: str) -> float:
        """Return the time, by the clock of this machine, at which the client's window ends."""
        return time.time() + self._found(key)[1]

    def check(self) -> bool:
        """Whether the database can be used."""
        self._found("")
        return True

    def reset(self) -> None:
        """Forget all clients."""
        with self._session.transaction() as transaction:
            transaction.connection.execute(text("DELETE FROM gradmem_rates"))

    def clear(self, key: str) -> None:
        """Forget a client."""
        with self._session.transaction() as transaction:
            transaction.connection.execute(text("DELETE FROM gradmem_rates WHERE client = :client"), {"client": key})

    def _found(self, key: str) -> tuple[int, float]:
        with self._session.transaction() as transaction:
            row = transaction.connection.execute(text(FOUND), {"client": key}).first()
        return (0, 0.0) if row is None or row[1] <= 0 else (int(row[0]), float(row[1]))
