"""Tools that write, ask, change, list and inspect the memories of the store."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from typing import TYPE_CHECKING, Annotated

from mcp.server.mcpserver import Context, MCPServer
from mcp_types import ToolAnnotations
from pydantic import Field

from ..errors import GradmemError
from ..serving.validation import Line, Query, Tags, Text
from ..store import Entry, content_hash
from .file_memories import open_path
from .file_texts import ROOT, is_path
from .tool_results import Found, Inspected, Listed, Stored
from .workspace import StepReport, Workspace

if TYPE_CHECKING:
    from ..model import BoundMemory

Ref = Annotated[Line, Field(description="Id or name of the memory.")]
Chunk = Annotated[int | None, Field(description="Number of a chunk, as `inspect` shows it; the first is 1.")]
READS = ToolAnnotations(read_only_hint=True, open_world_hint=False)
ADDS = ToolAnnotations(destructive_hint=False, open_world_hint=False)
CHANGES = ToolAnnotations(destructive_hint=True, open_world_hint=False)


class MemoryTools:
    """The tools. Their docstrings are what clients show to people and to models.

    Parameters
    ----------
    workspace : Workspace
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace

    async def remember(
        self,
        context: Context,
        text: Annotated[Text, Field(description="The text, of any length.")],
        name: Annotated[Line | None, Field(description="Name by which to ask the memory later.")] = None,
        tags: Annotated[Tags, Field(description="Tags, to find the memory by.")] = [],  # noqa: B006
    ) -> Stored:
        """Write a text into a new memory, so that questions about it can be answered later without the text.

        Writing takes seconds to minutes. A text that is remembered already is not written again.
        """
        space = self.workspace
        if name is not None and is_path(name):
            raise GradmemError(
                f"names below {ROOT} are those of files, which the tool `memory` creates: choose another"
            )
        engine = await space.writer()
        chunks = await space.chunks(engine.model, text)
        content = await asyncio.to_thread(content_hash, engine.model, chunks)
        entry = await space.store.change(lambda store: store.reuse(content, name=name, tags=tags))
        if entry is None:
            memory = await space.write(StepReport(context), engine, chunks)
            entry = await space.store.change(lambda store: store.put(memory, name=name, tags=tags, content=content))
        return Stored.of(entry)

    async def ask(
        self,
        context: Context,
        memory: Annotated[Line, Field(description="Id or name of the memory, or path of a file or a directory.")],
        question: Annotated[Query, Field(description="A question about the text.")],
    ) -> Found:
        """Answer a question from a memory alone, or from the text files below /memories.

        A file that has changed since it was last asked is written first, which takes seconds to minutes.
        """
        key: Hashable
        if is_path(memory):
            engine, bound, key = await open_path(self.workspace, context, memory)
        else:
            entry = await self.workspace.entry(memory)
            engine, bound = await self.workspace.open(entry)
            key = entry.id, entry.current.number
        return Found.of(await asyncio.wrap_future(engine.ask(key, bound, question)))

    async def append(
        self, context: Context, memory: Ref, text: Annotated[Text, Field(description="The text to append.")]
    ) -> Stored:
        """Write more text into a memory, as its next version. What was written before is not written again."""
        entry = await self._own(memory)
        engine, before = await self.workspace.open(entry)
        model = before.model
        if not model.appends:
            raise GradmemError(f"'{model.name}' cannot append without forgetting: `replace` the memory with all text")
        chunks = await self.workspace.chunks(model, text)
        longer = await self.workspace.write(StepReport(context), engine, chunks, model, onto=before)
        return await self._update(entry, longer)

    async def replace(
        self,
        context: Context,
        memory: Ref,
        text: Annotated[Text, Field(description="The new text.")],
        chunk: Annotated[Chunk, Field(description="Number of the chunk to replace. By default all of them.")] = None,
    ) -> Stored:
        """Replace the text of a memory, or of one chunk of it, as the next version of the memory."""
        from ..model import composing

        entry = await self._own(memory)
        engine, before = await self.workspace.open(entry)
        model = before.model
        row = None if chunk is None else composing.row_of(before, chunk)
        if row is None:
            chunks = await self.workspace.chunks(model, text)
        else:
            composing.check_together(model)
            chunks = [text]
        new = await self.workspace.write(StepReport(context), engine, chunks, model, before.receipts[row or 0].steps)
        return await self._update(entry, new if row is None else model.bind(composing.replaced(before, row, new)))

    async def forget(
        self,
        memory: Ref,
        chunk: Annotated[
            Chunk, Field(description="Number of the chunk to forget. By default the memory is deleted.")
        ] = None,
    ) -> str:
        """Delete a memory with all its versions, or make a next version of it without one chunk."""
        from ..model import composing

        entry = await self._own(memory)
        if chunk is None:
            await self.workspace.store.change(lambda store: store.delete(entry.id))
            return f"deleted {entry.label} with all its versions"
        _, before = await self.workspace.open(entry)
        row = composing.row_of(before, chunk)
        await self._update(entry, await asyncio.to_thread(before.model.forget, before, row))
        return (
            f"forgot chunk {chunk} of {entry.label}. Version {entry.current.number} still has it: to remove it for "
            "good, remember the rest as a new memory and forget this one"
        )

    async def list_memories(
        self,
        name: Annotated[Line | None, Field(description="Name, or the beginning of a name followed by *.")] = None,
        tags: Annotated[Tags, Field(description="Tags that the memories must have.")] = [],  # noqa: B006
        limit: Annotated[int, Field(ge=1, le=1000, description="Most memories to list.")] = 50,
        after: Annotated[Line | None, Field(description="`next` of the previous page.")] = None,
    ) -> Listed:
        """List memories, the newest first; by name if `name` is the beginning of one."""
        page = await self.workspace.store.read(lambda store: store.list(limit=limit, after=after, name=name, tags=tags))
        return Listed(
            memories=[Stored.of(entry) for entry in page], next=page[-1].cursor if len(page) == limit else None
        )

    async def inspect(self, memory: Ref) -> Inspected:
        """Show who wrote a memory, its chunks and its versions, and how much of the text it keeps."""
        entry = await self.workspace.entry(memory)
        return await self.workspace.store.read(
            lambda store: Inspected.of(entry, store.versions(entry.id), store.load(entry.id, entry.current.number))
        )

    async def _own(self, ref: str) -> Entry:
        """Return the entry of a memory that these tools may change: not that of a file."""
        entry = await self.workspace.entry(ref)
        if entry.name is not None and is_path(entry.name):
            raise GradmemError(f"{entry.name} is a file: change it with the tool `memory`")
        return entry

    async def _update(self, entry: Entry, memory: BoundMemory) -> Stored:
        """Store the next version of a memory, unless it has changed meanwhile."""
        expected = entry.current.number
        return Stored.of(
            await self.workspace.store.change(lambda store: store.update(entry.id, memory, expected=expected))
        )


def register(server: MCPServer, workspace: Workspace) -> None:
    """Add the tools to a server."""
    tools = MemoryTools(workspace)
    server.add_tool(tools.remember, annotations=ADDS)
    server.add_tool(tools.ask, annotations=READS)
    server.add_tool(tools.append, annotations=ADDS)
    server.add_tool(tools.replace, annotations=CHANGES)
    server.add_tool(tools.forget, annotations=CHANGES)
    server.add_tool(tools.list_memories, "list", annotations=READS)
    server.add_tool(tools.inspect, annotations=READS)
