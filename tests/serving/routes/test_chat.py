"""`/v1/chat/completions`, and `/v1/models`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.serving.requesting import JSON, TEXT, authorized, chat, client_of, events, refused, written
from tests.serving.routes.conftest import Plain

from chat_models import save_model
from documents import ROOT
from gradmem import MemoryModel, load
from gradmem.model.reading import read_answers
from gradmem.serving.api_keys import ApiKeys
from gradmem.serving.openai_chat import ChatRequest


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


def content(answer: Any) -> list[str]:
    """The texts of all choices."""
    assert answer.status_code == 200, answer.text
    return [choice["message"]["content"] for choice in answer.json()["choices"]]


def streamed(answer: Any) -> list[Any]:
    """The chunks of a stream, which ends as OpenAI's do."""
    found = [data for _, data in events(answer.text)]
    assert answer.status_code == 200
    assert found.pop() == "[DONE]"
    return found


def test_an_answer_is_as_long_as_it_may_be(plain: Plain) -> None:
    answers = {most: plain.chat(max_tokens=most).json() for most in (1, 5, 60)}
    long = answers[60]["choices"][0]["message"]["content"]
    assert len(long) == 60  # the model never writes an end token, and each letter is one
    for most, answer in answers.items():
        assert answer["choices"][0]["message"]["content"] == long[:most]
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == most
    assert content(plain.chat(max_completion_tokens=5)) == content(plain.chat(max_tokens=5, max_completion_tokens=5))
    refused(plain.chat(max_tokens=5, max_completion_tokens=6), 400, "not both")
    refused(plain.chat(max_tokens=1000), 400, "the limit of")
    refused(plain.chat(max_tokens=1025), 400, "max_tokens: ")


@pytest.mark.parametrize("several", [False, True])
def test_what_ends_an_answer_is_never_told(plain: Plain, several: bool) -> None:
    """Not even the beginning of it, in no piece and in no token, although each letter is a token of its own."""
    whole = content(plain.chat(max_tokens=40))[0]
    stop = whole[10:14]
    before = whole[: whole.index(stop)]
    asked = {"max_tokens": 40, "logprobs": True, "stop": ["never said", stop] if several else stop}
    answer = plain.chat(**asked)
    assert content(answer) == [before]
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
    assert answer.json()["usage"]["completion_tokens"] == len(before) + len(stop)
    assert "".join(one["token"] for one in answer.json()["choices"][0]["logprobs"]["content"]) == before
    chunks = streamed(plain.chat(**asked, stream=True))
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert "".join(choice["delta"].get("content", "") for choice in choices) == before
    tokens = [one["token"] for choice in choices for one in (choice["logprobs"] or {}).get("content", [])]
    assert "".join(tokens) == before
    assert choices[-1]["finish_reason"] == "stop"
    assert content(plain.chat(max_tokens=40, stop=whole[:2])) == [""]


def test_the_role_is_told_once_and_each_piece_has_its_tokens(plain: Plain) -> None:
    asked = {"max_tokens": 6, "stream": True, "logprobs": True, "stream_options": {"include_usage": True}}
    *chunks, usage = streamed(plain.chat(**asked, n=2))
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 12
    assert all(chunk["usage"] is None for chunk in chunks)
    for index in range(2):
        first, *rest, last = [one for chunk in chunks for one in chunk["choices"] if one["index"] == index]
        assert first["delta"]["role"] == "assistant"
        assert all("role" not in choice["delta"] for choice in (*rest, last))
        assert (last["delta"], last["finish_reason"], last["gradmem"]["answer_tokens"]) == ({}, "length", 6)
        for choice in (first, *rest):
            said = "".join(one["token"] for one in choice["logprobs"]["content"])
            assert said == choice["delta"]["content"] != ""


def test_log_probabilities_are_those_of_one_pass_over_the_answer(plain: Plain) -> None:
    """Whatever biases and temperatures change about the choice."""
    answer = plain.chat(max_tokens=7, logprobs=True, top_logprobs=3, temperature=1.5, seed=4).json()
    task, method = plain.model.task, plain.model.method
    query = task.encode_conversation([{"role": "user", "content": "Who signed?"}])
    ids = task.encode(answer["choices"][0]["message"]["content"])
    memory = plain.model.write("Ann signed the report.")
    ((wanted, _),) = read_answers(method, memory.prefix, [query], [ids])
    told = answer["choices"][0]["logprobs"]["content"]
    for own, token, one in zip(wanted, ids, told, strict=True):
        assert one["logprob"] == pytest.approx(float(own[token]), abs=1e-3)
        assert (one["token"], one["bytes"]) == (task.text([token]), [ord(task.text([token]))])
        assert [other["token"] for other in one["top_logprobs"]] == [task.text([i]) for i in own.topk(3).indices]
        assert [other["logprob"] for other in one["top_logprobs"]] == pytest.approx(
            own.topk(3).values.tolist(), abs=1e-3
        )


def test_draws_are_repeated_by_their_seed_alone(plain: Plain) -> None:
    """Also with others in the batch: choice `i` has the seed plus `i`."""
    drawn = {"max_tokens": 12, "temperature": 1.0}
    alone = [content(plain.chat(**drawn, seed=seed))[0] for seed in (7, 8)]
    assert alone[0] != alone[1]
    assert content(plain.chat(**drawn, seed=7, n=2)) == alone
    greedy = content(plain.chat(max_tokens=12))[0]
    assert greedy not in alone
    assert content(plain.chat(**drawn, top_p=0.0)) == content(plain.chat(max_tokens=12, n=2))[1:] == [greedy]
    assert content(plain.chat(max_tokens=12, top_p=1.0, seed=7)) == alone[:1]  # asks for draws too
    often = {"max_tokens": 30, "temperature": 0.0}
    varied = content(plain.chat(**often, frequency_penalty=2.0, presence_penalty=2.0))[0]
    assert len(set(varied)) > len(set(content(plain.chat(**often))[0]))
    refused(plain.chat(logit_bias={"259": 1}), 400, "the token 259, and the model has 259 tokens")


TEXT_PART = {"type": "text", "text": "Who signed?"}
PICTURED = {"role": "user", "content": [TEXT_PART, {"type": "image_url", "image_url": {"url": "x"}}]}


def test_parts_roles_and_labels(plain: Plain) -> None:
    plainly = content(plain.chat(max_tokens=3))
    for messages in (
        [{"role": "user", "content": [TEXT_PART]}],
        [{"role": "user", "content": [{"type": "text", "text": "Who "}, {"type": "text", "text": "signed?"}]}],
        [{"role": "user", "content": "Who signed?", "name": "ann", "tool_calls": None, "refusal": None}],
    ):
        assert content(plain.chat(max_tokens=3, messages=messages)) == plainly
    said = [
        [{"role": role, "content": "Be brief."}, {"role": "user", "content": "When?"}]
        for role in ("system", "developer")
    ]
    first, second = [plain.chat(max_tokens=3, messages=messages).json() for messages in said]
    assert first["choices"] == second["choices"]
    labels = {"user": "ann", "metadata": {"a": "b"}, "store": False, "tools": [], "response_format": {"type": "text"}}
    assert content(plain.chat(max_tokens=3, **labels)) == plainly


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"store": True}, "store", "unsupported_parameter"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "unsupported_parameter"),
        ({"tempratur": 1}, "tempratur", "unknown_parameter"),
        ({"stream_options": {"include_usage": True, "other": 1}}, "stream_options.other", "unknown_parameter"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"temperature": 2.1}, "temperature", "invalid_value"),
        ({"stop": ["a", ""]}, "stop[1]", "invalid_value"),
        ({"stop": ["a"] * 5}, "stop", "invalid_value"),
        ({"n": 17}, "n", "invalid_value"),
        ({"messages": None}, "messages", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "unsupported_value"),
        ({"messages": [PICTURED]}, "messages[0].content[1].type", "unsupported_value"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls", "unsupported_parameter"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_obeyed_is_refused_by_name(plain: Plain, fields: dict[str, Any], param: str, code: str) -> None:
    answer = plain.chat(**fields)
    refused(answer, 400, f"{param}: ")
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)


def test_any_name_of_a_field_is_answered(plain: Plain) -> None:
    for name, shown in ((r"\ud800", "unicode"), ("a b\\n" * 900, "a b a b"), ("", "no such field")):
        body = f'{{"model": "x", "messages": [{{"role": "user", "content": "x"}}], "{name}": 1}}'
        refused(plain.client.post("/v1/chat/completions", content=body.encode(), headers=JSON), 400, shown)


def test_every_field_of_openais_client_is_known() -> None:
    """None is answered with `no such field`, so that a user reads what this server does about it."""
    params = pytest.importorskip("openai.types.chat.completion_create_params")
    theirs = set(params.CompletionCreateParamsStreaming.__annotations__)
    theirs |= set(params.CompletionCreateParamsBase.__annotations__)
    assert theirs - set(ChatRequest.model_fields) == set()
    page = (ROOT / "docs" / "howto" / "openai.md").read_text(encoding="utf-8")
    assert not [name for name in ChatRequest.model_fields if f"`{name}" not in page]


def test_models_are_found_by_the_name_that_asks_them(plain: Plain) -> None:
    listed = plain.client.get("/v1/models").json()["data"]
    for model in listed:
        assert plain.client.get(f"/v1/models/{model['id']}").json() == model
    assert [model["id"] for model in listed] == [plain.name, f"{plain.name}:notes"]
    for model, words in (
        (f"{plain.name}:other", "no such memory"),
        ("other:notes", "was written by"),
        ("x", "no such"),
    ):
        answer = plain.client.get(f"/v1/models/{model}")
        refused(answer, 404, words)
        assert answer.json()["error"]["code"] == "model_not_found"
    refused(
        plain.post("chat/completions", model=plain.name, messages=[{"role": "user", "content": "x"}]), 400, "no memory"
    )
