"""The MCP server over HTTP: what is refused before the protocol's package reads it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gradmem import GradmemError
from gradmem.store import Store

pytest.importorskip("mcp")
from starlette.testclient import TestClient

from gradmem.agents.mcp_http import http_app
from gradmem.agents.mcp_server import MemoryServer
from gradmem.agents.workspace import Workspace
from gradmem.serving.api_keys import ApiKeys
from gradmem.serving.settings import Settings
from gradmem.serving.validation import MAX_QUOTES

HEADERS = {"Accept": "application/json, text/event-stream"}
LIST = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "list", "arguments": {}}}


def app_of(place: Path, **settings: Any) -> Any:
    server = MemoryServer(Workspace(Store(place / "store.db")))
    return http_app(server, Settings(checkpoints=(), **settings), ApiKeys(place / "keys.json"))


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    """A client of a server on loopback."""
    with TestClient(app_of(tmp_path, max_body=2**20), base_url="http://127.0.0.1:8001", headers=HEADERS) as client:
        yield client


def test_a_call_of_its_own_is_answered(client: TestClient) -> None:
    """Without a session, as there is none."""
    answer = client.post("/mcp", json=LIST)
    assert answer.status_code == 200
    assert '"memories":[]' in answer.text


def test_bodies_that_are_refused(client: TestClient) -> None:
    many = b"[" + b'"",' * MAX_QUOTES + b'""]'
    for content, headers, status in (
        (many, {"Content-Type": "application/json"}, 413),
        (b"{}", {"Content-Type": "text/plain"}, 415),
        (b"x" * (2**20 + 1), {"Content-Type": "application/json"}, 413),
        (b"{", {"Content-Type": "application/json"}, 400),
    ):
        answer = client.post("/mcp", content=content, headers=headers)
        assert (answer.status_code, list(answer.json())[-1]) == (status, "error")
    for method in ("GET", "DELETE"):
        answer = client.request(method, "/mcp")
        assert (answer.status_code, answer.headers["Allow"]) == (405, "POST")


def test_an_address_that_others_reach_needs_keys(tmp_path: Path) -> None:
    with pytest.raises(GradmemError, match="make a key first"):
        app_of(tmp_path, host="0.0.0.0")
