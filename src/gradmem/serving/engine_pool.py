"""One engine for each checkpoint that is served, started when it is first needed."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import Depends, Request

from ..device import device_named
from ..errors import unknown
from ..model import BoundMemory
from ..model.loading import load
from ..store import Entry
from .async_store import AsyncStore
from .engine import Engine
from .errors import Closed, NotServed, Stuck
from .settings import Settings
from .upstream import UpstreamEngine

ANSWERS = "compact"
"""The method with which a plain language model writes here: one whose memories answer questions."""


class EnginePool:
    """Engines by the names of their checkpoints.

    Parameters
    ----------
    settings : Settings
        Its `checkpoints` may be loaded. Requests cannot load any other.
    """

    def __init__(self, settings: Settings) -> None:
        self.names, self.settings = settings.checkpoints, settings
        self.loaded: dict[str, Engine] = {}
        self._closed = False
        self._locks = {name: asyncio.Lock() for name in self.names}

    async def get(self, name: str) -> Engine:
        """Return the engine of a checkpoint. Load the checkpoint if no request has needed it before.

        Raises
        ------
        GradmemError
            If the checkpoint is not served or cannot be loaded.
        """
        if name not in self._locks:
            raise unknown("checkpoint", name, self.names)
        if self._closed:
            raise Closed("the engines are closed")
        async with self._locks[name]:
            if name not in self.loaded:
                self.loaded[name] = await asyncio.to_thread(self._start, name)
        return self.loaded[name]

    async def open(self, store: AsyncStore, entry: Entry, version: int | None = None) -> tuple[Engine, BoundMemory]:
        """Load a memory, by default its current version, and bind it to its engine's model.

        Raises
        ------
        GradmemError
            If its checkpoint is not served, or now has other weights.
        """
        if entry.model not in self._locks:
            raise NotServed(f"the memory was written by '{entry.model}', which is not served here")
        engine = await self.get(entry.model)
        memory = await store.read(lambda s: s.load(entry.id, version or entry.current.number))
        return engine, await asyncio.to_thread(engine.model.bind, memory)  # another method may have to be put on it

    def check(self) -> None:
        """Raise `Closed` if the engines are closed, or `Stuck` if one makes no progress."""
        if self._closed:
            raise Closed("the engines are closed")
        for name, engine in self.loaded.items():
            if engine.stuck(self.settings.timeout):
                raise Stuck(f"'{name}' has made no progress for {self.settings.timeout:g} s")

    async def close(self, grace: float | None = None) -> None:
        """Accept no more requests and finish those that were accepted; see `Engine.close`."""
        self._closed = True
        await asyncio.gather(*(asyncio.to_thread(engine.close, grace) for engine in self.loaded.values()))

    def reopen(self) -> None:
        """Accept requests again. Engines are loaded anew."""
        self.loaded, self._closed = {}, False

    def _start(self, name: str) -> Engine:
        model = load(name).to(device_named(self.settings.device))
        model = model.with_method({"name": ANSWERS}) if model.plain else model
        # Computed here, since later only the engine's thread may use the weights.
        _ = model.fingerprints, model.method.backbone.token_cache_bytes
        most, upstream = self.settings.max_queue, self.settings.upstream
        if upstream is not None:
            return UpstreamEngine(model, upstream, max_queue=most, timeout=self.settings.timeout)
        return Engine(model, max_queue=most)


async def pool_of(request: Request) -> EnginePool:
    """Return the engines of the application."""
    engines: EnginePool = request.app.state.engines
    return engines


Pool = Annotated[EnginePool, Depends(pool_of)]
"""Parameter of a route: the engines of the application."""
