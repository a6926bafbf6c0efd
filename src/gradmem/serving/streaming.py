"""Server-sent events, and the progress of work on an engine's thread as the event loop follows it."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from concurrent.futures import CancelledError, Future
from http import HTTPStatus
from typing import Any, Generic, TypeVar

from fastapi.encoders import jsonable_encoder
from fastapi.responses import StreamingResponse

from .http_errors import error_response

MAX_UNREAD = 1000
"""Most published items that may wait to be sent. The work of a client that reads too slowly is cancelled."""
T = TypeVar("T")


class ProgressStream(Generic[T]):
    """Passes items from an engine's thread to the event loop, and cancels the work when nobody reads them any more."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[T | None] = asyncio.Queue()
        self._future: Future[Any] | None = None
        self._cancelled = False
        # The end of the request ends the work: the generator of `events` may be closed only later.
        if task := asyncio.current_task():
            task.add_done_callback(lambda _: self._cancel())

    def publish(self, item: T) -> None:
        """Pass on an item, from the engine's thread. Raises `CancelledError`, which ends the work, if nobody reads."""
        if self._cancelled or self._items.qsize() > MAX_UNREAD:
            raise CancelledError
        self._loop.call_soon_threadsafe(self._items.put_nowait, item)

    async def events(self, future: Future[Any]) -> AsyncIterator[T]:
        """Yield the published items until the future is done. Leaving this loop early cancels the future."""
        self._future = future
        future.add_done_callback(self._end)
        try:
            while (item := await self._items.get()) is not None:
                yield item
        finally:
            self._cancel()

    def _cancel(self) -> None:
        self._cancelled = True
        if self._future is not None:
            self._future.cancel()

    def _end(self, _: Future[Any]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._items.put_nowait, None)


async def last(items: AsyncIterator[T]) -> T:
    """Return the last item."""
    async for item in items:
        found = item
    return found


def finite(value: Any) -> Any:
    """Replace infinite numbers and NaN, which JSON does not have, by null."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


async def server_sent(items: AsyncIterator[tuple[str | None, Any]], end: str = "") -> StreamingResponse:
    """Answer with server-sent events. An error before the first event still gets its own HTTP status.

    Parameters
    ----------
    items : iterator of (str or None, object)
        Name and data of each event.
    end : str
        Text after the last event.
    """
    first = await anext(items)

    async def events() -> AsyncIterator[str]:
        try:
            yield _event(*first)
            async for item in items:
                yield _event(*item)
        except Exception as error:  # the status has been sent already: the error becomes an event
            response = error_response(error)
            yield _event("error", json.loads(bytes(response.body)))
            if response.status_code == HTTPStatus.INTERNAL_SERVER_ERROR:
                raise  # for the log
            return
        yield end

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


def _event(name: str | None, data: Any) -> str:
    text = json.dumps(finite(jsonable_encoder(data)))
    return (f"event: {name}\n" if name else "") + f"data: {text}\n\n"
