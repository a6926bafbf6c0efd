"""Tools by which an agent compresses its own context over MCP; see `gradmem.agents.focus`.

An MCP server sees nothing of the conversation and cannot shorten it. The program around the agent does that: it passes
the messages since `start_focus`, removes them, and puts the entry that it gets into the Knowledge block. The server
keeps nothing between the calls but the memories, which are in the store.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from mcp.server.mcpserver import Context, MCPServer
from mcp_types import ToolAnnotations
from pydantic import BaseModel, Field

from ..errors import GradmemError
from ..serving.validation import Content, Line, Query
from .focus import Learned
from .memory_tools import MemoryTools
from .pruned import TAG, checked, transcript
from .tool_results import Found
from .workspace import Workspace

MESSAGES, MEMORIES = 10_000, 1000
"""Most messages of one focus, and most memories that one question reads."""
Objective = Annotated[Line, Field(min_length=1, description="What you want to find out.")]
Agent = Annotated[Line, Field(min_length=1, description="Name of the agent or the task, if several use the server.")]
Messages = Annotated[
    list[dict[str, Any]],
    Field(
        max_length=MESSAGES,
        description="The messages since `start_focus` in the form of OpenAI's API, which the program around the agent "
        "adds. Without them nothing can be asked later.",
    ),
]


class Completed(BaseModel):
    """A focus that is complete."""

    knowledge: str = Field(description="Entry for the Knowledge block, which replaces the messages.")
    memory: str | None = Field(description="Id of the memory of the messages; null if none were given.")
    pruned_tokens: int = Field(description="Tokens of the messages.")
    knowledge_tokens: int = Field(description="Tokens of the entry.")


class FocusTools:
    """The tools. Their docstrings are what clients show to people and to models.

    Parameters
    ----------
    workspace : Workspace
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace

    async def start_focus(self, objective: Objective) -> str:
        """Begin an investigation. Call this before you search or read much, and `complete_focus` when you know more."""
        return f"Focus started: {objective}"

    async def complete_focus(
        self,
        context: Context,
        objective: Objective,
        learnings: Annotated[Content, Field(min_length=1, description="What you have learned, and what did not work.")],
        messages: Messages = [],  # noqa: B006
        agent: Agent = "agent",
    ) -> Completed:
        """End the investigation. Its messages leave the conversation: only your learnings stay, in its Knowledge block.

        Writing the memory of the messages, which `ask_pruned` asks, takes seconds to minutes.
        """
        text, entry = transcript(map(checked, messages)), str(Learned(objective, learnings))
        memory = None
        if text:
            memory = (await MemoryTools(self.workspace).remember(context, text, tags=[TAG, agent])).id
        task = (await self.workspace.writer()).model.task
        pruned, known = await asyncio.to_thread(lambda: [len(task.encode(one)) if one else 0 for one in (text, entry)])
        return Completed(knowledge=entry, memory=memory, pruned_tokens=pruned, knowledge_tokens=known)

    async def ask_pruned(
        self,
        question: Annotated[Query, Field(description="One question, in plain words.")],
        agent: Agent = "agent",
    ) -> Found:
        """Ask for a detail in messages that have left the conversation."""
        space = self.workspace
        entries = await space.store.read(lambda store: store.list(tags=[TAG, agent], limit=MEMORIES))
        if not entries:
            raise GradmemError(
                f"no messages of '{agent}' were pruned yet: `complete_focus` keeps those that it is given"
            )
        opened = [await space.open(entry) for entry in reversed(entries)]
        engine, memory = opened[0]
        if len(opened) > 1:
            memory = await asyncio.to_thread(engine.model.join, [memory for _, memory in opened])
        key = tuple((entry.id, entry.current.number) for entry in entries)
        return Found.of(await asyncio.wrap_future(engine.ask(key, memory, question)))


def register(server: MCPServer, workspace: Workspace) -> None:
    """Add the tools to a server."""
    tools, adds = FocusTools(workspace), ToolAnnotations(destructive_hint=False)
    reads = ToolAnnotations(read_only_hint=True)
    server.add_tool(tools.start_focus, annotations=reads)
    server.add_tool(tools.complete_focus, annotations=adds)
    server.add_tool(tools.ask_pruned, annotations=reads)
