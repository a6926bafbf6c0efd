"""Bodies of requests as they arrive: slow ones make room for others, and all of them together are bounded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.types import Receive

from .http_errors import Refused


class Gone(Exception):
    """The client has left."""


class Arrivals:
    """Reads bodies, so many and so many bytes at the same time.

    One body too many, and the one that has been arriving longest is refused; too many bytes, and the largest that is
    arriving is. So whoever sends slowly takes no place from those who do not.

    Parameters
    ----------
    most : int
        Bodies that arrive at the same time.
    most_bytes : int
        Bytes of those that arrive and of those whose requests are served.
    """

    def __init__(self, most: int, most_bytes: int) -> None:
        self.most, self.most_bytes = most, most_bytes
        self.held = 0
        self._sizes: dict[asyncio.Task[bytes], int] = {}
        """Bytes that have arrived of each body, the oldest first."""

    @asynccontextmanager
    async def body(self, receive: Receive, limit: int, seconds: float) -> AsyncIterator[bytes]:
        """The whole body, of at most `limit` bytes, which count until the context is left.

        Raises
        ------
        Refused
            When it is too large, does not arrive in time, or has to make room.
        Gone
            When the client leaves.
        """
        reading = asyncio.ensure_future(self._read(receive, limit))
        self._sizes[reading] = size = 0
        if len(self._sizes) > self.most:
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
            self.held -= size
            self._refuse(reading)
            await asyncio.gather(reading, return_exceptions=True)

    def _refuse(self, reading: asyncio.Task[bytes]) -> None:
        """Give up a body: its place and its bytes are free at once."""
        self.held -= self._sizes.pop(reading, 0)
        reading.cancel()

    async def _read(self, receive: Receive, limit: int) -> bytes:
        task, parts, more = asyncio.current_task(), [], True
        assert task is not None  # it is one of `body`
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Gone
            if task not in self._sizes:
                raise asyncio.CancelledError
            parts.append(message.get("body", b""))
            self.held += len(parts[-1])
            self._sizes[task] += len(parts[-1])
            if self._sizes[task] > limit:
                raise too_large(limit)
            if self.held > self.most_bytes:
                self._refuse(max(self._sizes, key=lambda one: self._sizes[one]))
                await asyncio.sleep(0)  # where it is this one, it ends here
            more = message.get("more_body", False)
        return b"".join(parts)


def too_large(limit: int) -> Refused:
    """The refusal of a body of more bytes."""
    return Refused(413, f"a request has at most {limit:,} bytes")
