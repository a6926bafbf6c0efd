"""What strangers may cost the server: nobody else's answer waits for it, and every refusal says why."""

from __future__ import annotations

import asyncio
import json
import socket
import sqlite3
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gradmem import MemoryModel, load
from gradmem.store import Store
from gradmem.tasks.base import Task

pytest.importorskip("fastapi")
import uvicorn
from fastapi import Request
from starlette.testclient import TestClient
from tests.serving.test_server import TEXT, authorized, client, client_of, keys, refused, served, written

from gradmem.serving import bodies, connections
from gradmem.serving import streaming as following
from gradmem.serving.api_keys import Keys
from gradmem.serving.app import create_app
from gradmem.serving.arrivals import Arrivals
from gradmem.serving.connections import Connection
from gradmem.serving.http_errors import Refused
from gradmem.serving.settings import Settings

__all__ = ["client", "keys", "served"]  # fixtures
JSON = {"Content-Type": "application/json"}
MANY = 2**20


# Bodies


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
    for text in ('"', "\\", '\\"', "\\\\", '\\\\"', ",[{" * bodies.MOST_OUTSIDE, '"' * MANY):
        bodies.check_json("application/json; charset=utf-8", json.dumps({"text": text, "more": [text]}).encode())
    many = json.dumps({"text": "\\", "more": [0] * bodies.MOST_OUTSIDE}).encode()
    with pytest.raises(Refused, match="more values"):
        bodies.check_json("application/json", many)


@pytest.mark.parametrize(
    ("path", "field", "more"),
    [
        ("/v1/memories", "checkpoint", {"text": "a7:Qz"}),
        ("/v1/memories", "name", {"text": "a7:Qz", "checkpoint": "HERE"}),
        ("/v1/memories/notes/ask", "queries.0", {}),
        ("/v1/chat/completions", "model", {"messages": [{"role": "user", "content": "a7"}]}),
        ("/v1/chat/completions", "memory_id", {"model": "HERE", "messages": [{"role": "user", "content": "a7"}]}),
        ("/v1/chat/completions", "messages.0.content", {"model": "HERE:notes"}),
    ],
)
def test_strings_are_limited(client: TestClient, served: str, path: str, field: str, more: dict[str, Any]) -> None:
    long, name = "x" * 4 * MANY, field.partition(".")[0]
    value = {"queries": [long], "messages": [{"role": "user", "content": long}]}.get(name, long)
    body = {key: served if one == "HERE" else one for key, one in more.items()} | {name: value}
    answer = client.post(path, json=body)
    refused(answer, 422, f"body.{field}: String should have at most")


def test_lists_are_limited_and_their_first_mistake_ends_them(client: TestClient, served: str) -> None:
    written(client, served, name="notes")
    for queries, words in (([[]] * 1000, "body.queries.0"), (["a7"] * 65, "at most 64")):
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


def test_no_long_text_reaches_a_tokenizer(
    client: TestClient, served: str, monkeypatch: pytest.MonkeyPatch, tiny: MemoryModel
) -> None:
    written(client, served, name="notes")
    encode = Task.encode

    def short(task: Task, text: str) -> list[int]:
        assert len(text) < 10**5
        return encode(task, text)

    monkeypatch.setattr(Task, "encode", short)
    long = "a7:Qz\n" * 10**5
    for path, body in (
        ("/v1/memories", {"text": long, "checkpoint": served}),
        ("/v1/memories", {"text": "x" * 10**6, "checkpoint": served, "stream": True}),
        ("/v1/memories/notes/ask", {"queries": ["x" * 60_000]}),
        ("/v1/chat/completions", {"model": f"{served}:notes", "messages": [{"role": "user", "content": long}]}),
    ):
        refused(client.post(path, json=body), 422, "characters; the limit of")
    refused(client.post("/v1/memories/texts", params={"checkpoint": served}, content=long), 422, "characters")


def test_a_long_text_before_is_not_searched(
    tiny: MemoryModel, tmp_path: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is anything written before it is refused."""
    chunked = MemoryModel.from_spec(tiny.spec["task"], tiny.spec["backbone"], {**tiny.spec["method"], "chunk": 8})
    memory = chunked.write(TEXT)
    monkeypatch.setattr(chunked.method, "extend", lambda *_, **__: pytest.fail("written"))
    with pytest.raises(Exception, match="`before` is not the text"):
        chunked.append(memory, "b1:c2", before="x" * MANY)


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
    refused(client.get("/v1/memories", params={name: value}), 422, f"query.{name}")


@pytest.mark.parametrize(
    "value", ["bytes=5-1", "bytes=a-b", "bytes=999999999-", "lines=1-2", "bytes=0-0,2-3", "bytes="]
)
def test_ranges_are_not_known(client: TestClient, served: str, value: str) -> None:
    written(client, served, name="notes")
    for path in ("/main.js", "/docs", "/", "/v1/memories/notes/file"):
        whole, ranged = client.get(path), client.get(path, headers={"Range": value})
        assert (ranged.status_code, ranged.content) == (200, whole.content)


@pytest.mark.parametrize(
    "key", ["context_tokens", "steps", "losses", "token_losses", "inner_lr", "options", "deep", "many"]
)
def test_records_hold_only_what_machines_know(client: TestClient, key: str) -> None:
    from gradmem import Receipt
    from stored import made

    huge = 10**400
    deep: Any = 0
    for _ in range(500):
        deep = [deep]
    change: dict[str, Any] = {
        "context_tokens": huge,
        "steps": -huge,
        "losses": [huge],
        "token_losses": [2**63],
        "inner_lr": [1, huge],
        "options": {"n_mem": huge},
        "deep": {"x": deep},
        "many": {str(number): number for number in range(5000)},
    }
    receipt = vars(made(1).receipts[0]) | {("options" if key in ("deep", "many") else key): change[key]}
    with pytest.raises(ValueError, match="a receipt's"):
        Receipt.read(receipt)


def test_a_header_that_would_take_long_to_parse_is_refused(client: TestClient) -> None:
    size = bodies.MOST_HEADER + 1
    data = size.to_bytes(8, "little") + b'{"__metadata__":{"records":"' + b"[" + b"0," * (size // 2)
    refused(client.post("/v1/memories/files", content=data), 422, "its header has more than")


# Arriving


class Slow:
    """A body of which nothing more comes after the first part."""

    def __init__(self, part: bytes = b"") -> None:
        self.part = part

    async def __call__(self) -> dict[str, Any]:
        if not self.part:
            await asyncio.Event().wait()
        part, self.part = self.part, b""
        return {"type": "http.request", "body": part, "more_body": True}


def quick(data: bytes) -> Callable[[], Awaitable[Any]]:
    """A body that is there at once."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": data}

    return receive


async def arrived(arrivals: Arrivals, receive: Any) -> bytes:
    async with arrivals.body(receive, 100, 60) as data:
        return data


def test_slow_bodies_make_room_for_others() -> None:
    """The slowest first, in number; in bytes, the largest."""

    async def run() -> None:
        arrivals = Arrivals(2, 150)
        slow = [asyncio.create_task(arrived(arrivals, Slow(b"x"))) for _ in range(5)]
        await asyncio.sleep(0.01)
        assert [one.done() for one in slow] == [True, True, True, False, False]
        assert await arrived(arrivals, quick(b"y" * 50)) == b"y" * 50
        await asyncio.sleep(0.01)
        assert [one.done() for one in slow] == [True, True, True, True, False]
        large = asyncio.create_task(arrived(arrivals, Slow(b"z" * 99)))
        await asyncio.sleep(0.01)
        assert not large.done()
        assert await arrived(arrivals, quick(b"y" * 52)) == b"y" * 52
        await asyncio.wait({*slow, large})
        for one in (*slow, large):
            assert isinstance(one.exception(), Refused)
        assert arrivals.held == 0

    asyncio.run(run())


def test_what_needs_no_key_reads_no_body_and_takes_no_place(served: str, keys: Keys, tmp_path: Path) -> None:
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


# Connections


class Listening:
    """A server of one path on a socket, as `gradmem serve` listens."""

    def __init__(self, most: int) -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(1 if scope["path"] == "/" else 64):
                await send({"type": "http.response.body", "body": b"x" * 2**20, "more_body": True})
            await send({"type": "http.response.body", "body": b"end"})

        config = uvicorn.Config(app, http=Connection, limit_concurrency=most, lifespan="off", log_config=None)
        self.server = uvicorn.Server(config)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]}, daemon=True)
        self.thread.start()

    def connect(self, sent: bytes = b"") -> socket.socket:
        """A connection that has sent something."""
        connection = socket.create_connection(self.listener.getsockname(), timeout=60)
        connection.sendall(sent)
        return connection

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(60)


@pytest.fixture
def listening(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listening]:
    """A server that takes four connections and is patient for a moment."""
    monkeypatch.setattr(connections, "PATIENCE", 1.0)
    made = Listening(4)
    yield made
    made.close()


GET = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def everything(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    found = b""
    try:
        while part := connection.recv(2**20):
            found += part
    except ConnectionResetError:
        pass
    return found


def test_silent_connections_take_nobodys_place(listening: Listening, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "PATIENCE", 60.0)
    silent = [listening.connect(sent) for sent in (b"", b"GET / HT", b"", b"\r\n", b"", b"GET", b"", b"")]
    for _ in range(3):
        assert everything(listening.connect(GET)).endswith(b"end\r\n0\r\n\r\n")
    assert everything(silent[0]) == b""


BEGINNINGS = {
    "silent": b"",
    "half a head": b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ",
    "half a second head": b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET / HT",
    "half a body after the answer": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nx",
}


def test_connections_that_stand_still_are_closed(listening: Listening) -> None:
    """What was asked before is answered."""
    opened = {kind: listening.connect(sent) for kind, sent in BEGINNINGS.items()}
    for kind, connection in opened.items():
        assert everything(connection).endswith(b"end\r\n0\r\n\r\n") == (b"\r\n\r\n" in BEGINNINGS[kind])


def test_who_does_not_take_an_answer_is_left(listening: Listening) -> None:
    """Only then: who reads has it whole."""
    large = GET.replace(b"/ ", b"/large ", 1)
    idle, reading = listening.connect(large), listening.connect(large)
    whole = everything(reading)
    assert whole.endswith(b"end\r\n0\r\n\r\n")
    while listening.server.server_state.connections:
        threading.Event().wait(0.05)
    assert len(everything(idle)) < len(whole)


@pytest.mark.parametrize("sent", [b"\x00" * 99, b"GET / HTTP/1.1\r\nX: " + b"x" * 10**5])
def test_what_is_no_http_is_refused_in_the_one_form(listening: Listening, sent: bytes) -> None:
    head, _, body = everything(listening.connect(sent)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert json.loads(body)["error"]["type"] == "bad_request"


# The store


def test_reads_do_not_wait_for_changes(client: TestClient, served: str, tmp_path: Path) -> None:
    """Another process holds the file; eight changes wait for it, and more of them than there are threads."""
    ref = written(client, served, name="notes")["id"]
    holder = sqlite3.connect(tmp_path / "store.db", isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN IMMEDIATE")
    with ThreadPoolExecutor(8) as pool:
        changes = [pool.submit(client.patch, f"/v1/memories/{ref}", json={"tags": [f"t{i}"]}) for i in range(8)]
        for path in ("/v1/memories", "/v1/memories/notes", "/v1/memories/notes/file", "/v1/models"):
            assert client.get(path).status_code == 200
        assert client.post("/v1/memories/notes/ask", json={"queries": ["a7"]}).status_code == 200
        assert not any(change.done() for change in changes)
        holder.execute("ROLLBACK")
        assert [change.result().status_code for change in changes] == [200] * 8
    holder.close()


def test_a_key_keeps_as_much_as_its_quota_says(served: str, keys: Keys, tmp_path: Path) -> None:
    """Each its own; what is deleted makes room, and what is refused was not kept."""
    one, two = (authorized(keys.add(owner)) for owner in ("one", "two"))
    store = Store(tmp_path / "store.db", max_memories=2)
    app = create_app(store, Settings(host="0.0.0.0", checkpoints=(served,)), keys)
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        new = [{"text": f"a{number}:Qz", "checkpoint": served} for number in range(3)]
        client.headers = one
        kept = [client.post("/v1/memories", json=each).json()["id"] for each in new[:2]]
        refused(client.post("/v1/memories", json=new[2]), 403, "at most 2 memories")
        streamed = client.post("/v1/memories", json={**new[2], "stream": True}).text
        assert "at most 2 memories" in streamed
        data = client.get(f"/v1/memories/{kept[0]}/file").content
        client.headers = two
        assert client.post("/v1/memories/files", content=data).status_code == 201
        client.headers = one
        assert client.delete(f"/v1/memories/{kept[0]}").status_code == 204
        assert client.post("/v1/memories", json=new[2]).status_code == 201
        assert len(client.get("/v1/memories").json()["memories"]) == 2


# The end


def test_who_still_waits_when_the_server_ends_is_told(client: TestClient, served: str) -> None:
    written(client, served, name="notes")
    engine, inside = client.app.state.engines.loaded[served], threading.Event()
    gate = threading.Event()
    held = engine.write("b1:c2", steps=100, on_step=lambda *_: (inside.set(), gate.wait(60)))
    inside.wait(60)
    waiting = {"text": "d3:e4", "checkpoint": served}
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(client.post, "/v1/memories", json={**waiting, "stream": on}) for on in (False, True)]
        while len(engine._writes) < 2:
            threading.Event().wait(0.01)
        closing = pool.submit(client.portal.call, client.app.state.engines.close, 0.0)
        while not engine._over():
            threading.Event().wait(0.01)
        gate.set()
        closing.result(60)
        for answer in answers:
            refused(answer.result(60), 503, "the server is closing")
    assert held.exception(60) is not None
    refused(client.post("/v1/memories", json=waiting), 503, "the server is closing")
    assert len(client.get("/v1/memories").json()["memories"]) == 1


def test_a_request_that_the_server_cuts_off_has_an_answer(served: str, keys: Keys, tmp_path: Path) -> None:
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
    assert json.loads(sent[1]["body"])["error"]["message"] == "the server is closing"


# Streams


def spoken(model: MemoryModel, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a model generate these tokens, whatever it is asked."""
    import torch

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


def chat(client: TestClient, model: str, **more: Any) -> Any:
    asked = {"model": f"{model}:notes", "messages": [{"role": "user", "content": "What is Mary carrying?"}]}
    return client.post("/v1/chat/completions", json={**asked, **more})


def test_streamed_pieces_are_the_answer_also_where_decoding_rewrites(
    tmp_path: Path, keys: Keys, tiny: MemoryModel, monkeypatch: pytest.MonkeyPatch
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


def test_the_page_of_the_api_is_of_this_server(client: TestClient) -> None:
    page = client.get("/docs")
    assert page.headers["Content-Type"].startswith("text/html")
    assert "http" not in page.text.replace("HTTP", "").replace("http-equiv", "")
    for name in ("docs.js", "style.css", "openapi.json"):
        assert client.get(f"/{name}").status_code == 200


def test_keys_are_as_the_openai_client_sends_them(served: str, keys: Keys, tmp_path: Path) -> None:
    headers = authorized(keys.add("one"))
    with client_of(served, keys, tmp_path, host="0.0.0.0") as client:
        refused(chat(client, served), 401, "a key is needed")
        client.headers = headers
        written(client, served, name="notes")
        refused(chat(client, served), 422, "has no answer format: ask a key of 2")
        asked = {"model": f"{served}:notes", "messages": [{"role": "user", "content": "a7"}]}
        found = client.post("/v1/chat/completions", json=asked).json()
        assert found["choices"][0]["message"]["content"] == load(served).write(TEXT).ask("a7")


def test_who_does_not_read_what_is_told_ends_the_work() -> None:
    async def run() -> None:
        followed = following.Following[int]()
        for number in range(following.MOST_UNREAD + 1):
            followed.tell(number)
            await asyncio.sleep(0)
        with pytest.raises(CancelledError):
            followed.tell(-1)

    asyncio.run(run())
