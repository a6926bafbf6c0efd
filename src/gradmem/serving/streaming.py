"""Server-sent events, and the progress of work on an engine's thread as the event loop follows it."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable
from concurrent.futures import CancelledError, Future
from http import HTTPStatus
from typing import Any, Generic, TypeVar

from fastapi.encoders import jsonable_encoder
from fastapi.responses import StreamingResponse

from .http_errors import Refused, refusal

MAX_UNREAD = 1000
"""Most published items that may wait to be sent. The work of a client that reads too slowly is cancelled."""
EVENT_STREAM = "text/event-stream"
T = TypeVar("T")


class ProgressStream(Generic[T]):
    """Passes items from an engine's thread to the event loop, and cancels the work when nobody reads them any more."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[T | None] = asyncio.Queue()
        self._futures: tuple[Future[Any], ...] = ()
        self._cancelled = False
        # The end of the request ends the work: the generator of `events` may be closed only later.
        if task := asyncio.current_task():
            task.add_done_callback(lambda _: self._cancel())

    def publish(self, item: T) -> None:
        """Pass on an item, from the engine's thread. Raises `CancelledError`, which ends the work, if nobody reads."""
        if self._cancelled or self._items.qsize() > MAX_UNREAD:
            raise CancelledError
        self._loop.call_soon_threadsafe(self._items.put_nowait, item)

    async def events(self, *futures: Future[Any]) -> AsyncIterator[T]:
        """Yield the published items until all futures are done or one has failed. Leaving early cancels them all."""
        self._futures = futures
        for future in futures:
            future.add_done_callback(self._end)
        try:
            waiting = len(futures)
            while waiting:
                if (item := await self._items.get()) is not None:
                    yield item
                    continue
                waiting -= 1
                if any(future.done() and (future.cancelled() or future.exception()) for future in futures):
                    return
        finally:
            self._cancel()

    def _cancel(self) -> None:
        self._cancelled = True
        for future in self._futures:
            future.cancel()

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


async def server_sent(
    items: AsyncIterator[tuple[str | None, Any]],
    end: str = "",
    failure: Callable[[Refused], tuple[str, Any]] = lambda refused: ("error", refused.body),
) -> StreamingResponse:
    """Answer with server-sent events. An error before the first event still gets its own HTTP status.

    Parameters
    ----------
    items : iterator of (str or None, object)
        Name and data of each event.
    end : str
        Text after the last event.
    failure : callable
        Makes the event, name and data, that ends a stream in which an error occurs.
    """
    first = await anext(items)

    async def events() -> AsyncIterator[str]:
        try:
            yield server_sent_event(*first)
            async for item in items:
                yield server_sent_event(*item)
        except Exception as error:  # the status has been sent already: the error becomes an event
            refused = refusal(error)
            yield server_sent_event(*failure(refused))
            if refused.status == HTTPStatus.INTERNAL_SERVER_ERROR:
                raise  # for the log
            return
        yield end

    return StreamingResponse(events(), media_type=EVENT_STREAM, headers={"Cache-Control": "no-store"})


def server_sent_event(name: str | None, data: Any) -> str:
    """One event as it is sent."""
    text = json.dumps(finite(jsonable_encoder(data)))
    return (f"event: {name}\n" if name else "") + f"data: {text}\n\n"
