"""An engine for each checkpoint that is served, made when it is first needed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated

from fastapi import Depends, Request

from ..device import device_named
from ..errors import unknown
from ..memory import Memory
from ..model.loading import load
from ..store import Entry
from .engine import Closed, Engine
from .http_errors import NotServed
from .owned import OwnedStore


class Engines:
    """Engines by the names of their checkpoints; there are never more than names.

    Parameters
    ----------
    names : sequence of str
        Checkpoints that may be loaded. What clients send never decides what else is.
    max_queue : int
        Of each engine.
    device : str
        Device that they run on.
    """

    def __init__(self, names: Sequence[str], max_queue: int, device: str = "auto") -> None:
        self.names, self.max_queue, self.device = tuple(names), max_queue, device
        self.loaded: dict[str, Engine] = {}
        self._closed = False
        self._loading = {name: asyncio.Lock() for name in names}

    async def get(self, name: str) -> Engine:
        """The engine of a checkpoint.

        Raises
        ------
        GradmemError
            When it is not served, or cannot be loaded.
        """
        if name not in self._loading:
            raise unknown("checkpoint", name, self.names)
        if self._closed:
            raise Closed("the engines are closed")
        async with self._loading[name]:
            if name not in self.loaded:
                self.loaded[name] = await asyncio.to_thread(self._start, name)
        return self.loaded[name]

    async def open(self, store: OwnedStore, entry: Entry, version: int | None = None) -> tuple[Engine, Memory]:
        """A memory, by default its current version, bound to its engine's model.

        Raises
        ------
        GradmemError
            When its checkpoint is not served, or has other weights now.
        """
        if entry.model not in self._loading:
            raise NotServed(f"the memory was written by '{entry.model}', which is not served here")
        engine = await self.get(entry.model)
        memory = await store.read(lambda kept: kept.load(entry.id, version or entry.current.number))
        return engine, engine.model.bind(memory)

    async def close(self, grace: float | None = None) -> None:
        """Finish what was accepted and take nothing more; see `Engine.close`."""
        self._closed = True
        await asyncio.gather(*(asyncio.to_thread(engine.close, grace) for engine in self.loaded.values()))

    def reopen(self) -> None:
        """Take requests again, for which engines are loaded anew."""
        self.loaded, self._closed = {}, False

    def _start(self, name: str) -> Engine:
        model = load(name).to(device_named(self.device))
        # Found once and here: later the weights are the engine's own thread's.
        _ = model.fingerprints, model.method.backbone.token_cache_bytes
        return Engine(model, max_queue=self.max_queue)


async def served(request: Request) -> Engines:
    """The engines of the application."""
    engines: Engines = request.app.state.engines
    return engines


Served = Annotated[Engines, Depends(served)]
