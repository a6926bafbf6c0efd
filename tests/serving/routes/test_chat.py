"""`/v1/chat/completions`, and `/v1/models`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.serving.requesting import TEXT, authorized, chat, client_of, refused, written

from chat_models import save_model
from gradmem import MemoryModel, load
from gradmem.serving.api_keys import ApiKeys


def spoken(model: MemoryModel, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a model generate these tokens, whatever it is asked."""

    def generate(memory: Any, queries: list[list[int]], *_: Any, control: Any = None, **__: Any) -> list[list[int]]:
        if control is not None:
            control.begin(list(range(len(queries))))
            for token in ids:
                control.ended(torch.tensor([[token]] * len(queries)), None)
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
            assert whole["choices"][0]["gradmem"]["finish_reason"] == reason
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
        refused(chat(client, served), 400, "is no query: ask for a key of 2")
        asked = {"model": f"{served}:notes", "messages": [{"role": "user", "content": "a7"}]}
        found = client.post("/v1/chat/completions", json=asked).json()
        assert found["choices"][0]["message"]["content"] == load(served).write(TEXT).ask("a7")


def test_a_conversation_about_a_document(tmp_path: Path, keys: ApiKeys) -> None:
    """Several turns stand behind the memory, and what the client says as the system; a long one is refused."""
    name = save_model(tmp_path / "lm")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who signed?"},
        {"role": "assistant", "content": "Ann."},
        {"role": "user", "content": "When?"},
    ]
    with client_of(name, keys, tmp_path) as client:
        new = {"text": "Ann signed the report.", "checkpoint": name, "name": "notes"}
        assert client.post("/v1/memories", json=new).status_code == 201
        model = client.app.state.engines.loaded[name].model
        answer = chat(client, name, messages=messages).json()
        ids = model.task.encode_conversation(messages)
        memory = model.write(new["text"])
        (wanted,) = model.answer_ids(memory, memory.prefix, [0], [ids])
        assert answer["choices"][0]["message"]["content"] == wanted.text
        assert answer["usage"]["prompt_tokens"] == len(ids) > len(model.task.encode_query("When?"))
        lines = chat(client, name, messages=messages, stream=True).text.split("\n\n")
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        assert "".join(one["delta"].get("content") or "" for c in chunks for one in c["choices"]) == wanted.text
        refused(chat(client, name, messages=messages[:1]), 400, "no message with the role `user`")
        refused(chat(client, name, messages=[*messages[:2], *messages[2:] * 40]), 400, "the limit of")
        refused(chat(client, name, messages=[{"role": "user", "content": " "}]), 400, "the query is empty")


def test_several_methods_of_one_model(tmp_path: Path, keys: ApiKeys) -> None:
    """Memories that were written elsewhere answer through the engine of their model, in one batch."""
    name = save_model(tmp_path / "lm")
    with client_of(name, keys, tmp_path) as client:
        answers = {}
        methods = [{"name": "cram", "n_mem": 2, "write_steps": 2}, {"name": "full_context"}]
        for method in [*methods, {"name": "compact", "budget": 0.5, "writers": "select"}]:
            memory = load(name, method).write("Ann signed the report.")
            url = f"/v1/memories/files?name={method['name']}"
            assert client.post(url, content=memory.to_bytes()).status_code == 201
            answers[method["name"]] = memory.ask("Who signed?")
        for ref, answer in answers.items():
            asked = client.post(f"/v1/memories/{ref}/ask", json={"queries": ["Who signed?"]}).json()
            assert asked["answers"][0]["text"] == answer
        assert list(client.app.state.engines.loaded) == [name]
