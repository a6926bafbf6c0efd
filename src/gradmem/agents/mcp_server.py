"""The MCP server: tools and resources over the store, for any client of the Model Context Protocol.

Each group of tools is a module with a function `register(server, workspace)`; `GROUPS` lists them.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import CancelledError
from importlib.metadata import version
from inspect import getdoc
from typing import Any

from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError, UnexpectedToolError
from mcp_types import CallToolResult, InputRequiredResult, Resource, TextContent
from pydantic import ValidationError

from ..errors import GradmemError
from ..serving.http_errors import refusal
from ..serving.telemetry import LOG
from . import file_tool, focus_tools, memory_tools, receipt_resources
from .workspace import Workspace

INSTRUCTIONS = (
    "Memories of texts. `remember` writes a text into a memory once; `ask` answers questions from it as often as you "
    "like, without the text. `list` shows the memories. `memory` keeps text files below /memories, for notes that you "
    "want to read again word by word."
)
GROUPS: tuple[Callable[[MCPServer, Workspace], None], ...] = (
    memory_tools.register,
    file_tool.register,
    focus_tools.register,
    receipt_resources.register,
)
"""What registers each group of tools and resources."""


class MemoryServer(MCPServer):
    """An MCP server whose tool errors are one line each: what is wrong, and what to do.

    Parameters
    ----------
    workspace : Workspace
    """

    def __init__(self, workspace: Workspace) -> None:
        # The log level is that of the whole process: at INFO the log would hold names and texts.
        super().__init__("gradmem", instructions=INSTRUCTIONS, version=version("gradmem"), log_level="WARNING")
        self.workspace = workspace
        for register in GROUPS:
            register(self, workspace)

    def add_tool(self, fn: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        """Add a tool, described by its docstring."""
        super().add_tool(fn, *arguments, **{"description": getdoc(fn), **options})

    async def list_resources(self) -> list[Resource]:
        """List the receipts of the newest memories."""
        return [*await super().list_resources(), *await receipt_resources.newest(self.workspace)]

    async def call_tool(
        self, name: str, arguments: dict[str, Any], context: Context | None = None
    ) -> CallToolResult | InputRequiredResult:
        """Call a tool. An error becomes a result with `isError`."""
        try:
            return await super().call_tool(name, arguments, context)
        except ToolError as error:
            content = TextContent(type="text", text=_message(name, error))
            return CallToolResult(content=[content], is_error=True)


def _message(tool: str, error: ToolError) -> str:
    """Describe an error of a tool. One that nobody expected is logged, and tells the client nothing."""
    cause = error.__cause__
    if isinstance(cause, ValidationError):
        first = cause.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    if not isinstance(error, UnexpectedToolError):
        return str(error)
    if not isinstance(cause, GradmemError | CancelledError):
        LOG.error("tool", exc_info=cause, extra={"fields": {"tool": tool}})
    return refusal(cause or error).message


async def run_stdio(server: MemoryServer) -> None:
    """Serve one client over standard input and output, until it closes them."""
    try:
        await server.run_stdio_async()
    finally:
        await server.workspace.close(grace=0)
