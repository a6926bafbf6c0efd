"""What tests of the HTTP API send, and how they read responses."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from gradmem.store import Store

pytest.importorskip("fastapi")
from starlette.testclient import TestClient

from gradmem.serving.api_keys import ApiKeys
from gradmem.serving.app import create_app
from gradmem.serving.settings import Settings

TEXT = "a7:Qz\nk2:9f"
JSON = {"Content-Type": "application/json"}
MANY = 2**20


def client_of(served: str, keys: ApiKeys, place: Path, **settings: Any) -> TestClient:
    """A client of a new server on a store in a folder."""
    app = create_app(Store(place / "store.db"), Settings(checkpoints=(served,), **settings), keys)
    return TestClient(app, base_url="http://127.0.0.1:8000", client=("127.0.0.1", 1))


class Once:
    """A request that arrives; after that nothing comes of its client."""

    def __init__(self) -> None:
        self.arrived = False

    async def __call__(self) -> dict[str, Any]:
        if self.arrived:
            await asyncio.Event().wait()
        self.arrived = True
        return {"type": "http.request", "body": b"", "more_body": False}


class Slow:
    """A body of which nothing more comes after the first part."""

    def __init__(self, part: bytes = b"") -> None:
        self.part = part

    async def __call__(self) -> dict[str, Any]:
        if not self.part:
            await asyncio.Event().wait()
        part, self.part = self.part, b""
        return {"type": "http.request", "body": part, "more_body": True}


def written(client: TestClient, served: str, **more: Any) -> dict[str, Any]:
    """Write the text; return what the server says of the memory."""
    answer = client.post("/v1/memories", json={"text": TEXT, "checkpoint": served, **more})
    assert answer.status_code == 201, answer.text
    return answer.json()


def events(text: str) -> list[tuple[str | None, Any]]:
    """Names and data of server-sent events."""
    found = []
    for block in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines())
        found.append(
            (fields.get("event"), fields["data"] if fields["data"] == "[DONE]" else json.loads(fields["data"]))
        )
    return found


def refused(answer: Any, status: int, words: str) -> None:
    """An answer is an error in the one form of all."""
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    assert words in answer.json()["error"]["message"]


def authorized(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def chat(client: TestClient, model: str, **more: Any) -> Any:
    asked = {"model": f"{model}:notes", "messages": [{"role": "user", "content": "What is Mary carrying?"}]}
    return client.post("/v1/chat/completions", json={**asked, **more})
