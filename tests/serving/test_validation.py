"""What requests may hold."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fastapi import Request
from starlette.testclient import TestClient
from tests.serving.requesting import JSON, MANY, refused, written

from gradmem.serving import validation
from gradmem.serving.http_errors import Refused


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", '{"model":"m","messages":[{"role":"user","content":[%s0]}]}' % ("0," * MANY)),
        ("/v1/memories/notes/ask", '{"queries":[%s0]}' % ("[]," * MANY)),
        ("/v1/memories/notes/ask", '{"queries":[%s""]}' % ('"",' * MANY)),
        ("/v1/memories/notes/ask", '{"queries":["a7"],"more":[%s""]}' % (r'"\"",' * MANY)),
        ("/v1/memories/notes/ask", "[" * MANY),
        ("/v1/memories", '{"tags":[%s"x"]}' % ('"x",' * MANY)),
        ("/v1/memories/notes/append", "{" + ",".join(f'"{i}":{i}' for i in range(MANY // 8)) + "}"),
    ],
    ids=["parts", "lists", "strings", "unknown field", "nested", "tags", "fields"],
)
def test_json_of_too_many_values_is_never_parsed(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, path: str, body: str
) -> None:
    async def parsed(_: Request) -> Any:
        raise AssertionError("parsed")

    monkeypatch.setattr(Request, "json", parsed)
    refused(client.post(path, content=body, headers=JSON), 413, "more values")


def test_json_is_counted_as_it_is() -> None:
    """Quotation marks and backslashes within strings are no ends of strings; nothing of them counts as values."""
    for text in ('"', "\\", '\\"', "\\\\", '\\\\"', ",[{" * validation.MAX_STRUCTURE_BYTES, '"' * MANY):
        validation.check_json("application/json; charset=utf-8", json.dumps({"text": text, "more": [text]}).encode())
    many = json.dumps({"text": "\\", "more": [0] * validation.MAX_STRUCTURE_BYTES}).encode()
    with pytest.raises(Refused, match="more values"):
        validation.check_json("application/json", many)


@pytest.mark.parametrize(
    ("path", "field", "more"),
    [
        ("/v1/memories", "checkpoint", {"text": "a7:Qz"}),
        ("/v1/memories", "name", {"text": "a7:Qz", "checkpoint": "HERE"}),
        ("/v1/memories/notes/ask", "queries[0]", {}),
        ("/v1/chat/completions", "model", {"messages": [{"role": "user", "content": "a7"}]}),
        ("/v1/chat/completions", "memory_id", {"model": "HERE", "messages": [{"role": "user", "content": "a7"}]}),
        ("/v1/chat/completions", "messages[0].content", {"model": "HERE:notes"}),
    ],
)
def test_strings_are_limited(client: TestClient, served: str, path: str, field: str, more: dict[str, Any]) -> None:
    long, name = "x" * 4 * MANY, field.partition("[")[0]
    value = {"queries": [long], "messages": [{"role": "user", "content": long}]}.get(name, long)
    body = {key: served if one == "HERE" else one for key, one in more.items()} | {name: value}
    answer = client.post(path, json=body)
    refused(answer, 400 if "chat" in path else 422, f"{field}: String should have at most")


def test_lists_are_limited_and_their_first_mistake_ends_them(client: TestClient, served: str) -> None:
    written(client, served, name="notes")
    for queries, words in (([[]] * 1000, "queries[0]"), (["a7"] * 65, "at most 64")):
        refused(client.post("/v1/memories/notes/ask", json={"queries": queries}), 422, words)
    tags = [str(number) for number in range(101)]
    new = {"text": "b1:c2", "checkpoint": served}
    refused(client.post("/v1/memories", json={**new, "tags": tags}), 422, "at most 100")
    refused(client.patch("/v1/memories/notes", json={"tags": tags}), 422, "at most 100")
    data, joined = client.get("/v1/memories/notes/file").content, ",".join(tags)
    for answer in (
        client.post("/v1/memories/files", params={"tags": joined}, content=data),
        client.post("/v1/memories/texts", params={"tags": joined, "checkpoint": served}, content="b1:c2"),
        client.get("/v1/memories", params={"tags": joined}),
    ):
        refused(answer, 422, "at most 100 tags")
    kept = client.post("/v1/memories", json={**new, "tags": tags[:100]})
    assert (kept.status_code, len(kept.json()["tags"])) == (201, 100)


@pytest.mark.parametrize("kind", ["", "application/x-www-form-urlencoded", "text/plain", "application/octet-stream"])
def test_who_forgets_the_content_type_is_told(client: TestClient, kind: str) -> None:
    headers = {"Content-Type": kind} if kind else {}
    for path in ("/v1/memories", "/v1/memories/notes/ask", "/v1/chat/completions", "/v1/memories/notes/append"):
        refused(
            client.post(path, content=b'{"queries": ["a7"]}', headers=headers), 415, "`Content-Type: application/json`"
        )


@pytest.mark.parametrize("name", ["since", "until"])
@pytest.mark.parametrize("value", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "1e400", "9" * 50, "x"])
def test_odd_times_are_refused(client: TestClient, name: str, value: str) -> None:
    refused(client.get("/v1/memories", params={name: value}), 422, f"{name}: ")


def test_a_header_that_would_take_long_to_parse_is_refused(client: TestClient) -> None:
    size = validation.MAX_HEADER_BYTES + 1
    data = size.to_bytes(8, "little") + b'{"__metadata__":{"records":"' + b"[" + b"0," * (size // 2)
    refused(client.post("/v1/memories/files", content=data), 422, "its header has more than")
