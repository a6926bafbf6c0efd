"""Who may use the server, and how much of it."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from tests.serving.requesting import TEXT, Once, Slow, authorized, chat, client_of, events, refused, written

from gradmem import GradmemError
from gradmem.serving.api_keys import ApiKeys
from gradmem.serving.engine import Engine
from gradmem.store import Store


def test_no_key_sees_anothers_memories(served: str, keys: ApiKeys, tmp_path: Path) -> None:
    one, two = (authorized(keys.add(owner)) for owner in ("one", "two"))
    with client_of(served, keys, tmp_path, host="0.0.0.0") as client:
        refused(client.get("/v1/memories"), 401, "a key is needed")
        refused(client.get("/metrics"), 401, "a key is needed")
        refused(client.get("/v1/memories", headers=authorized("gm-guessed")), 401, "a key is needed")
        assert client.get("/healthz").status_code == 200
        client.headers = one
        entry = written(client, served, name="mine")
        client.headers = two
        for ref in (entry["id"], "mine"):
            refused(client.get(f"/v1/memories/{ref}"), 404, "no such memory")
            refused(client.get(f"/v1/memories/{ref}/file"), 404, "no such memory")
            refused(client.delete(f"/v1/memories/{ref}"), 404, "no such memory")
            refused(client.post(f"/v1/memories/{ref}/ask", json={"queries": ["a7"]}), 404, "no such memory")
            refused(client.post(f"/v1/memories/{ref}/append", json={"text": TEXT}), 404, "no such memory")
            chat = {"model": f"{served}:{ref}", "messages": [{"role": "user", "content": "a7"}]}
            refused(client.post("/v1/chat/completions", json=chat), 404, "no such memory")
        assert client.get("/v1/memories").json()["memories"] == []
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == [served]
        keys.remove("two")
        refused(client.get("/v1/memories"), 401, "a key is needed")


def test_without_keys_only_loopback_is_served(served: str, keys: ApiKeys, tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.org"):
        with pytest.raises(GradmemError, match="make a key first"):
            client_of(served, keys, tmp_path, host=host)


def test_pages_of_other_sites_reach_nothing(client: TestClient) -> None:
    for headers in (
        {"Host": "rebound.example:8000"},
        {"Host": "127.0.0.1.example"},
        {"Origin": "http://elsewhere.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
    ):
        assert client.get("/v1/memories", headers=headers).status_code == 403, headers
    for host in ("127.0.0.1:8000", "localhost:8000", "[::1]:8000"):
        answer = client.get("/v1/memories", headers={"Host": host, "Origin": f"http://{host}"})
        assert answer.status_code == 200
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_answers_tell_browsers_to_stay_here(client: TestClient) -> None:
    """Also answers that refuse: a page of the server loads nothing from elsewhere, and no other page frames it."""
    for answer in (client.get("/"), client.get("/v1/memories"), client.get("/", headers={"Host": "other.example"})):
        policy = dict(part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; "))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert answer.headers["X-Frame-Options"] == "DENY"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_too_much_and_too_often(served: str, keys: ApiKeys, tmp_path: Path) -> None:
    with client_of(served, keys, tmp_path, max_body=100, rate=3) as client:
        refused(client.post("/v1/memories", json={"text": "x" * 200, "checkpoint": served}), 413, "at most 100 bytes")
        pieces = iter([b"x" * 60, b"x" * 60])
        refused(client.post("/v1/memories", content=pieces), 413, "at most 100 bytes")
        assert client.get("/v1/memories").status_code == 200
        late = client.get("/v1/memories")
        refused(late, 429, "in a minute")
        assert 1 <= int(late.headers["Retry-After"]) <= 61


def test_a_request_that_does_not_arrive_is_given_up(served: str, keys: ApiKeys, tmp_path: Path) -> None:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    app = client_of(served, keys, tmp_path, timeout=0.2).app
    scope = {"type": "http", "method": "POST", "path": "/v1/memories", "query_string": b"", "client": ("127.0.0.1", 1)}
    asyncio.run(app({**scope, "headers": [(b"host", b"127.0.0.1")]}, receive, send))
    assert sent[0]["status"] == 408


def test_more_requests_at_once_than_may_be_are_refused(
    served: str, keys: ApiKeys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one is served, the next finds no room; one that does not arrive makes room for the next."""
    answers: list[int] = []

    async def send(message: dict[str, Any]) -> None:
        answers.extend([message["status"]] if "status" in message else [])

    async def never() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    gate, inside, found = threading.Event(), threading.Event(), Store.list
    monkeypatch.setattr(Store, "list", lambda *given, **more: (inside.set(), gate.wait(60), found(*given, **more))[-1])

    async def requests() -> None:
        app = client_of(served, keys, tmp_path, max_requests=1).app
        about = {"type": "http", "method": "GET", "path": "/metrics", "query_string": b"", "client": ("127.0.0.1", 1)}
        scope = {**about, "headers": [(b"host", b"127.0.0.1")]}
        arriving = asyncio.create_task(app(dict(scope), never, send))
        await asyncio.sleep(0.05)
        await app(dict(scope), Once(), send)
        first = asyncio.create_task(app({**scope, "path": "/v1/memories"}, Once(), send))
        await asyncio.to_thread(inside.wait, 60)
        await app(dict(scope), Once(), send)
        gate.set()
        await first
        await app(dict(scope), Once(), send)
        await arriving

    asyncio.run(requests())
    assert sorted(answers[:2]) == [200, 503]
    assert answers[2:] == [429, 200, 200]


def test_a_request_ends_in_time_and_its_write_with_it(
    served: str, keys: ApiKeys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with client_of(served, keys, tmp_path) as client:
        written(client, served)
    with client_of(served, keys, tmp_path, timeout=0.5) as client:
        slow = {"text": "b1:c2", "checkpoint": served, "steps": 10_000}
        refused(client.post("/v1/memories", json=slow), 504, "longer than the server")
        assert len(client.get("/v1/memories").json()["memories"]) == 1


def test_a_stream_that_takes_too_long_says_so_and_ends(client: TestClient, served: str, monkeypatch: Any) -> None:
    written(client, served, name="notes")
    waiting: list[Future[Any]] = []

    def ask(*_: Any, on_text: Any, **__: Any) -> Future[Any]:
        on_text("Q")
        waiting.append(Future())
        return waiting[0]

    monkeypatch.setattr(Engine, "ask", ask)
    monkeypatch.setitem(vars(client.app.state.settings), "timeout", 1.0)  # type: ignore[attr-defined]
    (_, first), (name, last) = events(chat(client, served, stream=True).text)
    assert first["choices"][0]["delta"]["content"] == "Q"
    assert (name, last["error"]["code"]) == ("error", "gateway_timeout")
    assert waiting[0].cancelled()


def test_what_needs_no_key_reads_no_body_and_takes_no_place(served: str, keys: ApiKeys, tmp_path: Path) -> None:
    keys.add("one")
    app = client_of(served, keys, tmp_path, host="0.0.0.0", max_requests=1).app
    statuses: list[int] = []

    async def send(message: dict[str, Any]) -> None:
        statuses.extend([message["status"]] if "status" in message else [])

    async def run() -> None:
        about = {"type": "http", "query_string": b"", "client": ("10.0.0.1", 1), "headers": []}
        for method, path in (
            ("POST", "/healthz"),
            ("GET", "/healthz"),
            ("POST", "/"),
            ("GET", "/docs"),
            ("POST", "/v1/memories"),
        ):
            await app({**about, "method": method, "path": path}, Slow(b"x"), send)

    asyncio.run(run())
    assert statuses == [405, 200, 404, 200, 401]


def test_a_request_that_the_server_cuts_off_has_an_answer(served: str, keys: ApiKeys, tmp_path: Path) -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def run() -> None:
        app = client_of(served, keys, tmp_path).app
        about = {
            "type": "http",
            "method": "POST",
            "path": "/v1/memories",
            "query_string": b"",
            "client": ("127.0.0.1", 1),
        }
        task = asyncio.create_task(app({**about, "headers": [(b"host", b"127.0.0.1")]}, Slow(b"x"), send))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait({task})

    asyncio.run(run())
    assert sent[0]["status"] == 503
    assert json.loads(sent[1]["body"])["error"]["message"] == "the server is shutting down"
