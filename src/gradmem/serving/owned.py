"""The store as the owner of a request sees it, read and changed on threads that do not wait for one another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

from fastapi import Depends, Request

from ..store import Store

T = TypeVar("T")


@dataclass(frozen=True)
class Threads:
    """Threads for the store: changes may have to wait for one another, and reads never wait for changes.

    There are fewer than a store has connections.
    """

    reads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(8, "gradmem-read"))
    changes: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4, "gradmem-change"))


@dataclass(frozen=True)
class OwnedStore:
    """A store, to be used from the event loop."""

    store: Store
    threads: Threads

    async def read(self, act: Callable[[Store], T]) -> T:
        """What a function finds in the store."""
        return await asyncio.get_running_loop().run_in_executor(self.threads.reads, act, self.store)

    async def change(self, act: Callable[[Store], T]) -> T:
        """What a function that may change the store returns."""
        return await asyncio.get_running_loop().run_in_executor(self.threads.changes, act, self.store)


async def owned(request: Request) -> OwnedStore:
    """The store as the owner of the request's key sees it."""
    state = request.app.state
    return OwnedStore(state.store.owned_by(request.state.owner), state.threads)


Owned = Annotated[OwnedStore, Depends(owned)]
