"""Resources of the MCP server: the write receipts of each memory."""

from __future__ import annotations

import json

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ResourceNotFoundError
from mcp_types import Resource

from ..errors import Missing
from ..serving.streaming import finite
from ..store import Store
from .tool_results import receipts_uri
from .workspace import Workspace

MIME = "application/json"
LISTED = 100
"""Most memories whose receipts are listed."""


def register(server: MCPServer, workspace: Workspace) -> None:
    """Add the resources to a server."""

    async def receipts(memory: str) -> str:
        """Write receipts of a memory: who wrote it, from what, and how well each token is kept."""

        def read(store: Store) -> str:
            return json.dumps(finite([receipt.to_dict() for receipt in store.load(memory).receipts]))

        try:
            return await workspace.store.read(read)
        except Missing as error:
            raise ResourceNotFoundError(f"there is no memory '{memory}'") from error

    server.resource(receipts_uri("{memory}"), name="receipts", mime_type=MIME)(receipts)


async def newest(workspace: Workspace) -> list[Resource]:
    """List the receipts of the newest memories of the caller."""
    page = await workspace.store.read(lambda store: store.list(limit=LISTED))
    return [Resource(uri=receipts_uri(entry.id), name=f"receipts of {entry.label}", mime_type=MIME) for entry in page]
