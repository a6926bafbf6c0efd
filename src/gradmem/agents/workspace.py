"""What all tools of the MCP server share: the store of the caller, and the engines that write and answer."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING

from mcp.server.mcpserver import Context

from ..errors import GradmemError, Missing
from ..model.packaged import served_names
from ..serving.async_store import AsyncStore, StoreThreads
from ..serving.streaming import ProgressStream
from ..store import Entry, Store

if TYPE_CHECKING:  # what loads PyTorch is imported when it is needed, so that a client starts the server quickly
    from ..methods.base import Written
    from ..model import BoundMemory, MemoryModel
    from ..serving.engine import Engine
    from ..serving.engine_pool import EnginePool

OWNER: ContextVar[str | None] = ContextVar("owner", default=None)
"""Owner of the memories that the present request may use. None is the local user."""
WRITER = "smollm2"
"""The language model that writes if none is named."""


class StepReport:
    """Reports write steps to the client, as progress that grows over all texts of a request.

    Parameters
    ----------
    context : Context
        Of the request.
    """

    def __init__(self, context: Context) -> None:
        self._context, self._done = context, 0

    async def follow(self, steps: AsyncIterator[int]) -> None:
        """Report the steps of one text: each item is the number of steps that it takes in all."""
        before = self._done
        async for total in steps:
            self._done += 1
            await self._context.report_progress(self._done, max(self._done, before + total), "writing")


class Workspace:
    """The store and the models of a server, as its tools use them.

    Models are loaded when a tool first needs them.

    Parameters
    ----------
    store : Store
    checkpoints : sequence of str
        Checkpoints and plain language models. The first one writes; memories of all of them can be asked. By default
        `smollm2`, then all that `gradmem serve` serves.
    device : str
        Device that the models run on; see `device_named`.
    """

    def __init__(self, store: Store, checkpoints: Sequence[str] = (), device: str = "auto") -> None:
        self.checkpoints, self.device = tuple(checkpoints), device
        self._store, self._threads = store, StoreThreads()
        self._engines: EnginePool | None = None
        self._starting = asyncio.Lock()

    @property
    def store(self) -> AsyncStore:
        """The store, with the memories of the caller."""
        return AsyncStore(self._store.owned_by(OWNER.get()), self._threads)

    async def close(self, grace: float | None = None) -> None:
        """Accept no more requests of models and finish those that were accepted; see `Engine.close`."""
        if self._engines is not None:
            await self._engines.close(grace)

    async def engines(self) -> EnginePool:
        """Return the engines of all models. The first call takes seconds: it loads PyTorch."""
        async with self._starting:
            if self._engines is None:
                self._engines = await asyncio.to_thread(self._new_engines)
        return self._engines

    def _new_engines(self) -> EnginePool:
        from ..serving.engine_pool import EnginePool
        from ..serving.settings import Settings

        names = self.checkpoints or tuple(dict.fromkeys([WRITER, *served_names()]))
        return EnginePool(Settings(checkpoints=names, device=self.device))

    async def writer(self) -> Engine:
        """Return the engine that writes new memories."""
        engines = await self.engines()
        return await engines.get(engines.names[0])

    async def entry(self, ref: str) -> Entry:
        """Return the entry of a memory by its id or name.

        Raises
        ------
        GradmemError
            If there is no such memory.
        """
        try:
            return await self.store.read(lambda store: store.get(ref))
        except Missing as error:
            raise GradmemError(f"there is no memory '{ref}': the tool `list` shows them") from error

    async def open(self, entry: Entry) -> tuple[Engine, BoundMemory]:
        """Load a memory, and bind it to the model of its engine; see `EnginePool.open`."""
        engines = await self.engines()
        return await engines.open(self.store, entry)

    async def chunks(self, model: MemoryModel, text: str) -> list[str]:
        """Cut a text into the chunks in which `gradmem write` would write it."""
        if model.method.chunk_size is not None:
            return [text]
        return await asyncio.to_thread(model.encoder.chunks, text)

    async def write(
        self,
        report: StepReport,
        engine: Engine,
        chunks: Sequence[str],
        model: MemoryModel | None = None,
        steps: int | None = None,
        onto: BoundMemory | None = None,
    ) -> BoundMemory:
        """Write the chunks of a text. If the client cancels the request, the write ends.

        Parameters
        ----------
        report : StepReport
        engine : Engine
        chunks : sequence of str
        model : MemoryModel, optional
            The model of a memory that the engine opened, to write with its options. By default the engine's model.
        steps : int, optional
            Write steps; by default those of the model.
        onto : BoundMemory, optional
            Memory to append to.
        """
        progress = ProgressStream[int]()

        def on_step(written: Written, steps: int) -> None:
            progress.publish(steps * math.ceil(len(chunks) / len(written.taken)))

        text = chunks[0] if len(chunks) == 1 else list(chunks)
        future = engine.write(text, model=model, onto=onto, on_step=on_step, steps=steps)
        await report.follow(progress.events(future))
        return future.result()
