"""The tools by which an agent compresses its context over MCP, beside the model by itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gradmem
from gradmem.store import Store

pytest.importorskip("mcp")
from mcp import Client

from gradmem.agents.pruned import transcript

from .calling import call, refused, text_of

Talk = Callable[..., Any]
QUESTION = "Which host?"


def messages(log: str) -> list[dict[str, Any]]:
    asked = {"id": "c1", "type": "function", "function": {"name": "grep", "arguments": json.dumps({"for": "host"})}}
    return [
        {"role": "assistant", "content": None, "tool_calls": [asked]},
        {"role": "tool", "tool_call_id": "c1", "content": log},
    ]


def test_messages_become_a_memory_that_is_asked(talk: Talk, place: Path, language_model: str) -> None:
    texts = [transcript(messages(log)) for log in ("host a9", "host b7")]

    async def say(client: Client) -> dict[str, Any]:
        assert "find the host" in await text_of(client, "start_focus", objective="find the host")
        assert "no messages of 'agent'" in await refused(client, "ask_pruned", question=QUESTION)
        learned = {"objective": "find the host", "learnings": "it is a9"}
        done = await call(client, "complete_focus", **learned, messages=messages("host a9"))
        assert done["knowledge"] == "## find the host\nit is a9"
        assert done["knowledge_tokens"] == len(done["knowledge"])  # each byte is a token
        assert done["pruned_tokens"] == len(texts[0])
        await call(client, "complete_focus", **learned, messages=messages("host b7"))
        await call(client, "complete_focus", **learned, messages=messages("host zz"), agent="other")
        return await call(client, "ask_pruned", question=QUESTION)

    found = talk(say)
    model = gradmem.load(language_model)
    assert found["answer"] == model.join([model.write(text) for text in texts]).ask(QUESTION)
    with Store(place) as store:
        assert {entry.tags for entry in store.list()} == {("agent", "focus"), ("focus", "other")}


def test_without_messages_nothing_is_kept(talk: Talk, place: Path) -> None:
    async def say(client: Client) -> None:
        done = await call(client, "complete_focus", objective="find", learnings="nothing")
        assert done["memory"] is None
        assert done["pruned_tokens"] == 0
        wrong = {"objective": "find", "learnings": "it", "messages": [{"content": "x"}]}
        assert "with a role" in await refused(client, "complete_focus", **wrong)

    talk(say)
    with Store(place) as store:
        assert not store.list()
