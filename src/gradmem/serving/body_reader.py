"""Reads the bodies of requests within limits: slow ones make room for others, and their bytes are bounded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.types import Receive

from .errors import ClientDisconnected
from .http_errors import Refused


class BodyReader:
    """Reads bodies, within a limit on their number and one on their bytes.

    If too many bodies are being read, the oldest is refused. If they have too many bytes, the largest is refused. So a
    client that sends slowly takes no room from others.

    Parameters
    ----------
    max_bodies : int
        Most bodies that are read at the same time.
    max_bytes : int
        Most bytes of all bodies that are being read or whose requests are being served.
    """

    def __init__(self, max_bodies: int, max_bytes: int) -> None:
        self.max_bodies, self.max_bytes = max_bodies, max_bytes
        self.nbytes = 0
        self._sizes: dict[asyncio.Task[bytes], int] = {}
        """Bytes that have arrived of each body, the oldest first."""

    @asynccontextmanager
    async def body(self, receive: Receive, limit: int, seconds: float) -> AsyncIterator[bytes]:
        """Read a body of at most `limit` bytes. Its bytes count until the context ends.

        Raises
        ------
        Refused
            If the body is too large, takes longer than `seconds`, or has to make room for others.
        ClientDisconnected
            If the client disconnects.
        """
        reading = asyncio.ensure_future(self._read(receive, limit))
        self._sizes[reading] = size = 0
        if len(self._sizes) > self.max_bodies:
            self._refuse(next(iter(self._sizes)))
        try:
            await asyncio.wait({reading}, timeout=seconds)
            if reading.cancelled():
                raise Refused(503, "too many requests are arriving at the same time", retry_after=1)
            if not reading.done():
                raise Refused(408, "the request did not arrive in time")
            data = reading.result()
            size = self._sizes.pop(reading)
            yield data
        finally:
            self.nbytes -= size
            self._refuse(reading)
            await asyncio.gather(reading, return_exceptions=True)

    def _refuse(self, reading: asyncio.Task[bytes]) -> None:
        """Stop reading a body, which frees its room at once."""
        self.nbytes -= self._sizes.pop(reading, 0)
        reading.cancel()

    async def _read(self, receive: Receive, limit: int) -> bytes:
        task, parts, more = asyncio.current_task(), [], True
        assert task is not None  # it is one of `body`
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnected
            if task not in self._sizes:
                raise asyncio.CancelledError
            parts.append(message.get("body", b""))
            self.nbytes += len(parts[-1])
            self._sizes[task] += len(parts[-1])
            if self._sizes[task] > limit:
                raise body_too_large(limit)
            if self.nbytes > self.max_bytes:
                self._refuse(max(self._sizes, key=lambda one: self._sizes[one]))
                await asyncio.sleep(0)  # if this is the largest body, it is cancelled here
            more = message.get("more_body", False)
        return b"".join(parts)


def body_too_large(limit: int) -> Refused:
    """Build the error for a body of more than `limit` bytes."""
    return Refused(413, f"a request has at most {limit:,} bytes")
