"""Slow and large bodies make room for others."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from tests.serving.requesting import Slow

from gradmem.serving.body_reader import BodyReader
from gradmem.serving.http_errors import Refused


def quick(data: bytes) -> Callable[[], Awaitable[Any]]:
    """A body that is there at once."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": data}

    return receive


async def arrived(reader: BodyReader, receive: Any) -> bytes:
    async with reader.body(receive, 100, 60) as data:
        return data


def test_slow_bodies_make_room_for_others() -> None:
    """The slowest first, in number; in bytes, the largest."""

    async def run() -> None:
        reader = BodyReader(2, 150)
        slow = [asyncio.create_task(arrived(reader, Slow(b"x"))) for _ in range(5)]
        await asyncio.sleep(0.01)
        assert [one.done() for one in slow] == [True, True, True, False, False]
        assert await arrived(reader, quick(b"y" * 50)) == b"y" * 50
        await asyncio.sleep(0.01)
        assert [one.done() for one in slow] == [True, True, True, True, False]
        large = asyncio.create_task(arrived(reader, Slow(b"z" * 99)))
        await asyncio.sleep(0.01)
        assert not large.done()
        assert await arrived(reader, quick(b"y" * 52)) == b"y" * 52
        await asyncio.wait({*slow, large})
        for one in (*slow, large):
            assert isinstance(one.exception(), Refused)
        assert reader.nbytes == 0

    asyncio.run(run())
