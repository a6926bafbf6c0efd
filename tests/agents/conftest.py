"""A server of a tiny language model, and a client in the same process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from chat_models import save_model
from gradmem.store import Store

pytest.importorskip("mcp")
from mcp import Client

from gradmem.agents.mcp_server import MemoryServer
from gradmem.agents.workspace import Workspace


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a tiny language model."""
    return save_model(tmp_path_factory.mktemp("language_model"))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """File of the store."""
    return tmp_path / "store.db"


@pytest.fixture
def talk(language_model: str, place: Path) -> Callable[[Callable[[Client], Awaitable[Any]]], Any]:
    """Run a conversation with a new server on the store."""

    async def conversation(say: Callable[[Client], Awaitable[Any]]) -> Any:
        with Store(place) as store:
            workspace = Workspace(store, [language_model])
            try:
                async with Client(MemoryServer(workspace)) as client:
                    return await say(client)
            finally:
                await workspace.close()

    return lambda say: asyncio.run(conversation(say))
