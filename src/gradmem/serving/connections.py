"""Connections as `gradmem serve` takes them: those that stand still are closed, and make room for others."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .http_errors import Refused, problem

PATIENCE = 10.0
"""Seconds in which a connection must bring a whole head of a request, and take something of an answer."""
GRACE = 25.0
"""Seconds after SIGTERM in which what was accepted may finish; those who still wait are then told so."""
FULL = Refused(503, "the server has too many connections", retry_after=1)
NO_HTTP = Refused(400, "this is no HTTP/1.1 request, or its head is too long")


class Connection(H11Protocol):
    """One connection, of `limit_concurrency` of them.

    One too many, and the one that has been waiting longest for a request is closed: who sends a request takes its
    place at once, and silent ones take nobody's.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.most, self.limit_concurrency = self.limit_concurrency, None  # uvicorn's own limit refuses the newest
        self._since = self.loop.time()
        self._unsent = 0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def waits(self) -> bool:
        """Whether it has no request that is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, and close another one where there are too many."""
        super().connection_made(transport)
        self._look_again()
        if self.most is not None and len(self.connections) > self.most:
            others = (one for one in self.connections if isinstance(one, Connection) and one is not self and one.waits)
            oldest = min(others, key=lambda one: one._since, default=None)
            if oldest is None:
                self._refuse(FULL)
            else:
                self.connections.discard(oldest)
                oldest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what was sent, unless the connection is being closed."""
        if not self.transport.is_closing():
            super().data_received(data)

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self._since = self.loop.time()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP."""
        self._refuse(NO_HTTP)

    def _look_again(self) -> None:
        self._timer = self.loop.call_later(PATIENCE, self._look)

    def _look(self) -> None:
        """Close it if it stands still."""
        unsent = self.transport.get_write_buffer_size()
        late = self.waits and not unsent and self.loop.time() - self._since >= PATIENCE
        if late or (unsent and unsent == self._unsent):
            self.transport.abort()
            return
        self._unsent = unsent
        self._look_again()

    def _refuse(self, why: Refused) -> None:
        """Answer in the form of all errors, and close."""
        answer = problem(why)
        headers = [*answer.raw_headers, (b"connection", b"close")]
        events = (
            h11.Response(status_code=why.status, headers=headers),
            h11.Data(data=bytes(answer.body)),
            h11.EndOfMessage(),
        )
        for event in events:
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class Server(uvicorn.Server):
    """A server that tells those who wait when it ends before they are answered."""

    async def shutdown(self, sockets: Any = None) -> None:
        """Finish what was accepted, within `GRACE` seconds."""
        engines = self.config.app.state.engines  # type: ignore[union-attr]
        closing = asyncio.ensure_future(engines.close(GRACE))
        await super().shutdown(sockets)
        await closing


def most_connections(wanted: int) -> int:
    """As many connections as wanted, or as files may be open beside the store's."""
    try:
        import resource
    except ImportError:  # Windows knows no such limit
        return wanted
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return wanted if files == resource.RLIM_INFINITY else max(1, min(wanted, files // 2))
