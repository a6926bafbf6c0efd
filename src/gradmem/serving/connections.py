"""Connections of `gradmem serve`: idle ones are closed, and make room for others."""

from __future__ import annotations

import asyncio
import signal
import time
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .http_errors import Refused, error_response

IDLE_SECONDS = 10.0
"""Seconds in which a connection must bring the whole head of a request, and accept some bytes of a response."""
LEAVING_SECONDS = 4.0
"""Seconds after SIGTERM in which a proxy that checks the server can learn that it is about to end."""
SHUTDOWN_SECONDS = 25.0
"""Seconds after that in which accepted requests may finish. Those that still wait then get an error."""
TOO_MANY = Refused(503, "the server has too many connections", retry_after=1)
NOT_HTTP = Refused(400, "this is not an HTTP/1.1 request, or its head is too long")


class Connection(H11Protocol):
    """One connection, of at most `limit_concurrency`.

    If there is one too many, the connection that has waited longest for a request is closed. So idle connections never
    keep out a client that sends a request.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # uvicorn's own limit would refuse the newest connection.
        self.max_connections, self.limit_concurrency = self.limit_concurrency, None
        self._idle_since = self.loop.time()
        self._unsent = 0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def idle(self) -> bool:
        """Whether no request of the connection is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept the connection, and close an idle one if there are too many."""
        super().connection_made(transport)
        self._schedule_check()
        if self.max_connections is not None and len(self.connections) > self.max_connections:
            others = (one for one in self.connections if isinstance(one, Connection) and one is not self and one.idle)
            oldest = min(others, key=lambda one: one._idle_since, default=None)
            if oldest is None:
                self._refuse(TOO_MANY)
            else:
                self.connections.discard(oldest)
                oldest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Pass on the data, unless the connection is closing."""
        if not self.transport.is_closing():
            super().data_received(data)

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self._idle_since = self.loop.time()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse data that is not HTTP."""
        self._refuse(NOT_HTTP)

    def _schedule_check(self) -> None:
        self._timer = self.loop.call_later(IDLE_SECONDS, self._check_progress)

    def _check_progress(self) -> None:
        """Close the connection if it has made no progress since the last check."""
        unsent = self.transport.get_write_buffer_size()
        late = self.idle and not unsent and self.loop.time() - self._idle_since >= IDLE_SECONDS
        if late or (unsent and unsent == self._unsent):
            self.transport.abort()
            return
        self._unsent = unsent
        self._schedule_check()

    def _refuse(self, why: Refused) -> None:
        """Answer with an error, and close the connection."""
        response = error_response(why)
        headers = [*response.raw_headers, (b"connection", b"close")]
        events = (
            h11.Response(status_code=why.status, headers=headers),
            h11.Data(data=bytes(response.body)),
            h11.EndOfMessage(),
        )
        for event in events:
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class Server(uvicorn.Server):
    """A server that answers waiting requests with an error when it shuts down."""

    async def shutdown(self, sockets: Any = None) -> None:
        """Let proxies send requests elsewhere first, then finish the accepted ones within `SHUTDOWN_SECONDS`.

        A connection that is made when the listening socket closes is lost. So whoever checks `/readyz` is told before,
        for `LEAVING_SECONDS`, and until then everything is served. After Ctrl-C nobody is waited for.
        """
        state = self.config.app.state  # type: ignore[union-attr]
        readiness = state.readiness
        if readiness is not None and readiness.watched and signal.SIGINT not in self._captured_signals:
            readiness.leaving = True
            until = time.monotonic() + LEAVING_SECONDS
            while time.monotonic() < until and not self.force_exit:
                await asyncio.sleep(0.1)
        closing = asyncio.ensure_future(state.engines.close(SHUTDOWN_SECONDS))
        await super().shutdown(sockets)
        await closing


def connection_limit(wanted: int) -> int:
    """Return the wanted number of connections, or fewer if the process may not open so many files."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return wanted
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return wanted if files == resource.RLIM_INFINITY else max(1, min(wanted, files // 2))
