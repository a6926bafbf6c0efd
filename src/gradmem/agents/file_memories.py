"""The memories of text files: written from a file when it is first asked, and again after its text has changed."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from typing import TYPE_CHECKING

from mcp.server.mcpserver import Context

from ..errors import GradmemError, Missing
from ..store import Entry
from ..store.text_files import TextFile, TextFiles
from .file_texts import checked_path
from .workspace import StepReport, Workspace

if TYPE_CHECKING:
    from ..model import BoundMemory
    from ..serving.engine import Engine


async def open_path(
    workspace: Workspace, context: Context, path: str
) -> tuple[Engine, BoundMemory, tuple[Hashable, ...]]:
    """Return the memory of a file, or of all files of a directory as one document, with its engine and its cache key.

    Parameters
    ----------
    workspace : Workspace
    context : Context
        Gets progress notifications of what has to be written.
    path : str

    Raises
    ------
    GradmemError
        If there is no file with a text, or one cannot be written.
    """
    path = checked_path(path)
    try:
        files = await workspace.store.read(lambda store: TextFiles(store).read(path))
    except Missing as error:
        raise GradmemError(f"there is no file at {path}: the tool `memory` with `view` shows them") from error
    engine = await workspace.writer()
    report = StepReport(context)
    opened = [await _open_file(workspace, report, engine, file) for file in files if file.text.strip()]
    if not opened:
        raise GradmemError(f"there is no text at {path}")
    entries, memories = zip(*opened, strict=True)
    joined = memories[0] if len(memories) == 1 else await asyncio.to_thread(engine.model.join, memories)
    return engine, joined, tuple((entry.id, entry.current.number) for entry in entries)


async def _open_file(
    workspace: Workspace, report: StepReport, engine: Engine, file: TextFile
) -> tuple[Entry, BoundMemory]:
    """Return the memory of a file, written now if there is none of the model that writes."""
    if file.memory is not None:
        entry = await workspace.entry(file.memory)
        if entry.checkpoint == engine.model.fingerprints["checkpoint"]:
            return entry, (await workspace.open(entry))[1]
    memory = await workspace.write(report, engine, await workspace.chunks(engine.model, file.text))
    return await workspace.store.change(lambda store: TextFiles(store).keep(file, memory)), memory
