"""Progress of work on an engine."""

from __future__ import annotations

import asyncio
from concurrent.futures import CancelledError

import pytest

pytest.importorskip("fastapi")
from gradmem.serving import streaming


def test_who_does_not_read_what_is_told_ends_the_work() -> None:
    async def run() -> None:
        followed = streaming.ProgressStream[int]()
        for number in range(streaming.MAX_UNREAD + 1):
            followed.publish(number)
            await asyncio.sleep(0)
        with pytest.raises(CancelledError):
            followed.publish(-1)

    asyncio.run(run())
