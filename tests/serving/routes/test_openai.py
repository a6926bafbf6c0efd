"""The parts of OpenAI's API."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.serving.requesting import TEXT, authorized, chat, client_of, refused, written

from gradmem import MemoryModel, load
from gradmem.serving.api_keys import ApiKeys


def spoken(model: MemoryModel, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a model generate these tokens, whatever it is asked."""

    def generate(memory: Any, queries: list[list[int]], *_: Any, streamer: Any = None, **__: Any) -> list[list[int]]:
        if streamer is not None:
            if hasattr(streamer, "begin"):
                streamer.begin(list(range(len(queries))))
            streamer.put(torch.tensor(queries))
            for token in ids:
                streamer.put(torch.tensor([token] * len(queries)))
            streamer.end()
        return [ids] * len(queries)

    monkeypatch.setattr(model.method, "generate", generate)


def test_streamed_pieces_are_the_answer_also_where_decoding_rewrites(
    tmp_path: Path, keys: ApiKeys, tiny: MemoryModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bAbI's lists: "apple ," becomes "apple,milk" with the third token. Cut answers say so, whole ones too."""
    task = {"name": "babi", "tasks": "qa8", "data": None}
    backbone = {name: value for name, value in tiny.spec["backbone"].items() if name != "vocab_size"}
    MemoryModel.from_spec(task, backbone, tiny.spec["method"]).save_pretrained(tmp_path / "babi")
    name = str(tmp_path / "babi")
    with client_of(name, keys, tmp_path) as client:
        new = {"text": "Mary got the apple.", "checkpoint": name, "name": "notes"}
        assert client.post("/v1/memories", json=new).status_code == 201
        model = client.app.state.engines.loaded[name].model
        words = model.task.encode("apple , milk , football")
        for ids, reason in (([*words, model.task.end_id], "stop"), (words, "length"), (words[:2], "length")):
            spoken(model, ids, monkeypatch)
            whole = chat(client, name).json()
            usage = whole["usage"]
            assert (whole["choices"][0]["finish_reason"], usage["completion_tokens"]) == (reason, len(ids))
            assert usage["total_tokens"] == usage["prompt_tokens"] + len(ids) > len(ids)
            assert whole["gradmem"]["finish_reason"] == reason
            lines = chat(client, name, stream=True, stream_options={"include_usage": True}).text.split("\n\n")
            chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
            pieces = [one["delta"].get("content") or "" for chunk in chunks for one in chunk["choices"]]
            assert "".join(pieces) == whole["choices"][0]["message"]["content"]
            assert [one["finish_reason"] for chunk in chunks for one in chunk["choices"]][-2:] == [None, reason]
            assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], usage)
            asked = client.post("/v1/memories/notes/ask", json={"queries": ["What is Mary carrying?"]}).json()
            assert asked["answers"][0]["finish_reason"] == reason


def test_keys_are_as_the_openai_client_sends_them(served: str, keys: ApiKeys, tmp_path: Path) -> None:
    headers = authorized(keys.add("one"))
    with client_of(served, keys, tmp_path, host="0.0.0.0") as client:
        refused(chat(client, served), 401, "a key is needed")
        client.headers = headers
        written(client, served, name="notes")
        refused(chat(client, served), 422, "is no query: ask for a key of 2")
        asked = {"model": f"{served}:notes", "messages": [{"role": "user", "content": "a7"}]}
        found = client.post("/v1/chat/completions", json=asked).json()
        assert found["choices"][0]["message"]["content"] == load(served).write(TEXT).ask("a7")
