"""Work on an engine's thread, followed from the event loop, and given up when nobody follows it any more."""

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

from .http_errors import problem

MOST_UNREAD = 1000
"""Things that may have been told and not been sent: who is so far behind does not follow."""
T = TypeVar("T")


class Following(Generic[T]):
    """What an engine tells about a piece of work, as it comes."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._told: asyncio.Queue[T | None] = asyncio.Queue()
        self._future: Future[Any] | None = None
        self._left = False
        # Whatever ends the request ends the work: generators may be closed later.
        if task := asyncio.current_task():
            task.add_done_callback(lambda _: self._leave())

    def tell(self, item: T) -> None:
        """For the engine's thread: pass on one thing. Raises, which ends the work, when nobody follows it any more."""
        if self._left or self._told.qsize() > MOST_UNREAD:
            raise CancelledError
        self._loop.call_soon_threadsafe(self._told.put_nowait, item)

    async def until_done(self, future: Future[Any]) -> AsyncIterator[T]:
        """What is told until the work is done; whoever leaves this loop early has given up the work."""
        self._future = future
        future.add_done_callback(self._end)
        try:
            while (item := await self._told.get()) is not None:
                yield item
        finally:
            self._leave()

    def _leave(self) -> None:
        self._left = True
        if self._future is not None:
            self._future.cancel()

    def _end(self, _: Future[Any]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._told.put_nowait, None)


async def last(items: AsyncIterator[T]) -> T:
    """The last of some items."""
    async for item in items:
        found = item
    return found


def finite(value: Any) -> Any:
    """A value as JSON knows it: numbers that are none become null."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


async def server_sent(items: AsyncIterator[tuple[str | None, Any]], end: str = "") -> StreamingResponse:
    """Answer with events of a name and data, the first of which is awaited: what fails before it has its own status.

    Parameters
    ----------
    items : iterator of (str or None, object)
    end : str
        What stands after the last event.
    """
    first = await anext(items)

    async def events() -> AsyncIterator[str]:
        try:
            yield _event(*first)
            async for item in items:
                yield _event(*item)
        except Exception as error:  # the status is sent already: say it where the rest is said
            answer = problem(error)
            yield _event("error", json.loads(bytes(answer.body)))
            if answer.status_code == HTTPStatus.INTERNAL_SERVER_ERROR:
                raise  # for the log
            return
        yield end

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


def _event(name: str | None, data: Any) -> str:
    text = json.dumps(finite(jsonable_encoder(data)))
    return (f"event: {name}\n" if name else "") + f"data: {text}\n\n"
