"""The store for the event loop: its calls run on threads, and each request sees the memories of its owner."""

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
class StoreThreads:
    """Threads for the store. Reads have their own, so that they never wait for changes, which may wait for a lock.

    There are fewer threads than a store has connections.
    """

    reads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(8, "gradmem-read"))
    changes: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4, "gradmem-change"))


@dataclass(frozen=True)
class AsyncStore:
    """A store that the event loop can use without blocking.

    Attributes
    ----------
    store : Store
    threads : StoreThreads
    """

    store: Store
    threads: StoreThreads

    async def read(self, action: Callable[[Store], T]) -> T:
        """Run a function that only reads the store, and return its result."""
        return await asyncio.get_running_loop().run_in_executor(self.threads.reads, action, self.store)

    async def change(self, action: Callable[[Store], T]) -> T:
        """Run a function that may change the store, and return its result."""
        return await asyncio.get_running_loop().run_in_executor(self.threads.changes, action, self.store)


async def store_of(request: Request) -> AsyncStore:
    """Return the store with the memories of the request's owner."""
    state = request.app.state
    return AsyncStore(state.store.owned_by(request.state.owner), state.threads)


OwnStore = Annotated[AsyncStore, Depends(store_of)]
"""Parameter of a route: the store of the request's owner."""
