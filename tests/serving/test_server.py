"""The HTTP API: what it answers, to whom, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch
from sqlalchemy import event

from gradmem import Client, GradmemError, Memory, MemoryModel, load
from gradmem.errors import Missing
from gradmem.memory import SCALE
from gradmem.store import Store
from stored import made

pytest.importorskip("fastapi")
from starlette.testclient import TestClient

from gradmem.serving.api_keys import Keys
from gradmem.serving.app import create_app
from gradmem.serving.settings import Settings

TEXT = "a7:Qz\nk2:9f"


@pytest.fixture(scope="module")
def served(tiny: MemoryModel, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Name of a checkpoint that is served."""
    folder = tmp_path_factory.mktemp("served") / "tiny"
    tiny.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    """An empty file of keys."""
    return Keys(tmp_path / "keys.json")


def client_of(served: str, keys: Keys, place: Path, **settings: Any) -> TestClient:
    """A client of a new server on a store in a folder."""
    app = create_app(Store(place / "store.db"), Settings(checkpoints=(served,), **settings), keys)
    return TestClient(app, base_url="http://127.0.0.1:8000", client=("127.0.0.1", 1))


@pytest.fixture
def client(served: str, keys: Keys, tmp_path: Path) -> Iterator[TestClient]:
    """A client of a server on loopback."""
    with client_of(served, keys, tmp_path) as client:
        yield client


class Once:
    """A request that arrives; after that nothing comes of its client."""

    def __init__(self) -> None:
        self.arrived = False

    async def __call__(self) -> dict[str, Any]:
        if self.arrived:
            await asyncio.Event().wait()
        self.arrived = True
        return {"type": "http.request", "body": b"", "more_body": False}


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


def test_an_application_may_start_again(served: str, keys: Keys, tmp_path: Path) -> None:
    """Whoever mounts it may end and begin its lifespan: what it closed then, it opens then."""
    client = client_of(served, keys, tmp_path)
    for _ in range(2):
        with client:
            ref = written(client, served)["id"]
            assert client.post(f"/v1/memories/{ref}/ask", json={"queries": ["a7"]}).status_code == 200


def refused(answer: Any, status: int, words: str) -> None:
    """An answer is an error in the one form of all."""
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    assert words in answer.json()["error"]["message"]


# Memories


def test_write_ask_list_inspect_append_and_delete(client: TestClient, served: str) -> None:
    entry = written(client, served, name="notes", tags=["work"])
    assert written(client, served)["id"] == entry["id"]
    answers = client.post("/v1/memories/notes/ask", json={"queries": ["a7", "zz"]}).json()["answers"]
    wanted = load(served).write(TEXT).answer(["a7", "zz"])
    assert [answer["text"] for answer in answers] == [answer.text for answer in wanted]
    assert answers[0]["logprob"] == pytest.approx(wanted[0].logprob, abs=1e-4)
    assert answers[0].keys() == vars(wanted[0]).keys()
    assert [one["id"] for one in client.get("/v1/memories?tags=work").json()["memories"]] == [entry["id"]]
    shown = client.get("/v1/memories/notes").json()
    assert shown["memory"]["id"] == entry["id"]
    assert len(shown["records"][0]["token_losses"]) == entry["current"]["tokens"]
    assert "Qz" not in json.dumps(shown)
    assert client.delete(f"/v1/memories/{entry['id']}").status_code == 204
    refused(client.get("/v1/memories/notes"), 404, "no such memory")


def test_pages_of_a_listing(client: TestClient, served: str) -> None:
    ids = [written(client, served, steps=steps)["id"] for steps in (0, 1, 2)]
    first = client.get("/v1/memories?limit=2").json()
    rest = client.get("/v1/memories", params={"limit": 2, "after": first["next"]}).json()
    assert [one["id"] for one in first["memories"] + rest["memories"]] == ids[::-1]
    assert rest["next"] is None


def test_a_write_tells_its_losses(client: TestClient, served: str) -> None:
    wanted = {"text": TEXT, "checkpoint": served, "steps": 3, "stream": True}
    told = events(client.post("/v1/memories", json=wanted).text)
    assert [name for name, _ in told] == ["step"] * 4 + ["memory"]
    assert [(data["step"], data["of"]) for _, data in told[:-1]] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    losses = client.get(f"/v1/memories/{told[-1][1]['id']}").json()["records"][0]["losses"]
    assert [data["loss"] for _, data in told[1:-1]] == pytest.approx(losses[:-1], abs=1e-5)


def test_append_makes_a_version(client: TestClient, tiny: MemoryModel, tmp_path: Path, keys: Keys) -> None:
    chunked = MemoryModel.from_spec(tiny.spec["task"], tiny.spec["backbone"], {**tiny.spec["method"], "chunk": 8})
    chunked.save_pretrained(tmp_path / "chunked")
    with client_of(str(tmp_path / "chunked"), keys, tmp_path) as client:
        entry = written(client, str(tmp_path / "chunked"))
        more = client.post(f"/v1/memories/{entry['id']}/append", json={"text": "b1:c2", "before": TEXT})
        assert more.json()["current"]["number"] == 2
        receipts = client.get(f"/v1/memories/{entry['id']}").json()["records"]
        assert len(receipts[0]["earlier"]) == 1
        asked = {"queries": ["b1"], "version": 1}
        assert client.post(f"/v1/memories/{entry['id']}/ask", json=asked).status_code == 200


def test_a_watched_write_tells_tokens_and_their_losses(client: TestClient, served: str) -> None:
    """After each step the losses are those of a memory of as many steps; what is kept already is watched again."""
    wanted = {"text": TEXT, "checkpoint": served, "steps": 2, "stream": True, "tokens": True}
    told = events(client.post("/v1/memories", json=wanted).text)
    assert [name for name, _ in told] == ["tokens", "step", "step", "step", "memory"]
    model = load(served)
    assert "".join(told[0][1]["tokens"]) == model.task.context_text(TEXT) == "!a7:Qz!!k2:9f!|"
    for number, (_, data) in enumerate(told[1:-1]):
        receipt = model.write(TEXT, number).receipts[0]
        assert data["token_losses"] == pytest.approx(receipt.token_losses, abs=1e-3)
    again = events(client.post("/v1/memories", json=wanted).text)
    assert [name for name, _ in again] == ["tokens", "step", "step", "step", "memory"]
    assert again[-1][1]["id"] == told[-1][1]["id"]
    assert "token_losses" not in events(client.post("/v1/memories", json=wanted | {"tokens": False}).text)[0][1]


def test_appending_is_refused_where_it_was_never_trained(client: TestClient, served: str) -> None:
    ref = written(client, served, steps=1)["id"]
    refused(client.post(f"/v1/memories/{ref}/append", json={"text": "b1:c2"}), 422, "never trained to append")
    assert client.get(f"/v1/memories/{ref}").json()["memory"]["current"]["number"] == 1
    more = client.post(f"/v1/memories/{ref}/append", json={"text": "b1:c2", "may_forget": True}).json()
    assert (more["current"]["number"], more["current"]["unmeasured"] > 0, more["current"]["at_risk"]) == (2, True, None)
    (receipt,) = client.get(f"/v1/memories/{ref}").json()["records"]
    assert (receipt["earlier"][0]["lost"], receipt["earlier"][0]["measured"]) == (None, False)


def test_a_watched_append_shows_what_is_appended(
    client: TestClient, tiny: MemoryModel, tmp_path: Path, keys: Keys
) -> None:
    chunked = MemoryModel.from_spec(tiny.spec["task"], tiny.spec["backbone"], {**tiny.spec["method"], "chunk": 8})
    chunked.save_pretrained(tmp_path / "chunked")
    with client_of(str(tmp_path / "chunked"), keys, tmp_path) as client:
        ref = written(client, str(tmp_path / "chunked"))["id"]
        wanted = {"text": "b1:c2", "steps": 1, "stream": True, "tokens": True}
        told = events(client.post(f"/v1/memories/{ref}/append", json=wanted).text)
        assert "".join(told[0][1]["tokens"]) == "!b1:c2!|"
        last = client.get(f"/v1/memories/{ref}").json()["records"][0]
        assert told[-2][1]["token_losses"] == pytest.approx(last["token_losses"], abs=1e-3)


def test_change_renames_tags_and_pins(client: TestClient, served: str) -> None:
    ref = written(client, served, name="notes", tags=["a"])["id"]
    changed = client.patch("/v1/memories/notes", json={"name": "other", "tags": ["b", "c"], "pinned": True}).json()
    assert (changed["id"], changed["name"], changed["tags"], changed["pinned"]) == (ref, "other", ["b", "c"], True)
    assert client.get("/v1/memories?name=other").json()["memories"] == [changed]
    refused(client.get("/v1/memories/notes"), 404, "no such memory")
    refused(client.delete(f"/v1/memories/{ref}"), 409, "pinned")
    only = client.patch(f"/v1/memories/{ref}", json={"pinned": False}).json()
    assert (only["name"], only["tags"], only["pinned"]) == ("other", ["b", "c"], False)
    assert client.patch(f"/v1/memories/{ref}", json={"name": None}).json()["name"] is None
    assert client.patch(f"/v1/memories/{ref}", json={}).json()["tags"] == ["b", "c"]
    refused(client.patch("/v1/memories/none", json={"name": "x"}), 404, "no such memory")
    refused(client.patch(f"/v1/memories/{ref}", json={"name": "x", "tags": ["a,b"]}), 422, "a tag")
    assert client.get(f"/v1/memories/{ref}").json()["memory"]["name"] is None
    taken = client.post("/v1/memories", json={"text": "b1:c2", "checkpoint": served, "name": "taken"})
    assert taken.status_code == 201
    refused(client.patch(f"/v1/memories/{ref}", json={"name": "taken"}), 409, "taken")


def test_a_change_that_is_ended_in_the_middle_has_not_happened(client: TestClient, served: str) -> None:
    written(client, served, name="notes", tags=["a"])
    before, left = client.get("/v1/memories").json(), 0

    def end(_: object, cursor: object, statement: str, *rest: object) -> None:
        nonlocal left
        if statement.startswith(("UPDATE", "INSERT", "DELETE")):
            left -= 1
            if left < 0:
                raise RuntimeError

    event.listen(client.app.state.store._engine, "before_cursor_execute", end)
    wanted, changes = {"name": "other", "tags": ["b"], "pinned": True}, 0
    while client.patch("/v1/memories/notes", json=wanted).status_code == 500 and changes < 20:
        assert client.get("/v1/memories").json() == before
        left = changes = changes + 1
    (entry,) = client.get("/v1/memories").json()["memories"]
    assert (entry["name"], entry["tags"], entry["pinned"]) == ("other", ["b"], True)


def test_checkpoints_say_what_they_are_for(client: TestClient, served: str) -> None:
    assert client.get("/v1/checkpoints").json() == {"checkpoints": [served], "max_body": 2**23}
    about = client.get(f"/v1/checkpoints/{quote(served, safe='')}?seed=3").json()
    model = load(served)
    assert (about["name"], about["task"], about["method"], about["write_steps"]) == (served, "kv", "gradmem", 2)
    assert (about["vectors"], about["width"], about["calibrated"]) == (8, 16, False)
    text, truth = model.task.example(3)
    shown = about["example"]
    assert (shown["text"], [(one["query"], one["answer"]) for one in shown["questions"]]) == (text, truth)
    assert truth == model.task.examples(text)
    ids = model.encode(model.task.context_text(text), "context", 10**6)
    assert about["token_cache_bytes"] * len(ids) == model.method.backbone.cache_bytes(torch.tensor([ids]))
    refused(client.get("/v1/checkpoints/gpt2"), 404, "no such checkpoint")
    ref = written(client, served)["id"]
    assert client.get(f"/v1/memories/{ref}").json()["memory_bytes"] == 4 * about["vectors"] * about["width"]


def test_files_go_out_and_in(client: TestClient, served: str) -> None:
    entry = written(client, served)
    data = client.get(f"/v1/memories/{entry['id']}/file").content
    assert len(Memory.from_bytes(data)) == 1
    client.delete(f"/v1/memories/{entry['id']}")
    kept = client.post("/v1/memories/files?name=back&tags=a,b", content=data)
    assert (kept.status_code, kept.json()["tags"]) == (201, ["a", "b"])
    assert client.post("/v1/memories/back/ask", json={"queries": ["a7"]}).status_code == 200
    foreign = client.post("/v1/memories/files", content=made(1).to_bytes()).json()
    refused(client.post(f"/v1/memories/{foreign['id']}/ask", json={"queries": ["a7"]}), 409, "not served")


def test_text_files_are_written(client: TestClient, served: str) -> None:
    """As the same text in JSON is, so that it is written once."""
    about = {"checkpoint": served, "name": "notes", "tags": "a,b", "steps": "2"}
    kept = client.post("/v1/memories/texts", params=about, content=b"\xef\xbb\xbf" + TEXT.encode())
    assert (kept.status_code, kept.json()["tags"]) == (201, ["a", "b"])
    assert written(client, served, name="notes", steps=2)["id"] == kept.json()["id"]
    streamed = client.post("/v1/memories/texts", params={**about, "stream": True, "steps": 3}, content=TEXT).text
    assert streamed.count("event: step") == 0  # a name that is taken is told before
    streamed = client.post(
        "/v1/memories/texts", params={"checkpoint": served, "stream": True, "steps": 3}, content=TEXT
    )
    assert streamed.text.count("event: step") == 4
    refused(client.post("/v1/memories/texts", params=about, content=b"a7:\xff"), 422, "not UTF-8: byte 3")
    refused(client.post("/v1/memories/texts", content=TEXT), 422, "checkpoint")


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/memories", {"text": "", "checkpoint": "HERE"}, 422, "empty"),
        ("/v1/memories", {"text": "a7:\ud800", "checkpoint": "HERE"}, 422, "body"),
        ("/v1/memories", {"text": "a7:Qz", "checkpoint": "gpt2"}, 422, "unknown checkpoint"),
        ("/v1/memories", {"text": "a7:Qz", "checkpoint": "HERE", "steps": -1}, 422, "body.steps"),
        ("/v1/memories", {"text": "a7:Qz", "checkpoint": "HERE", "name": "x" * 201}, 422, "name"),
        ("/v1/memories/none/ask", {"queries": ["a7"]}, 404, "no such memory"),
        ("/v1/memories/none/ask", {"queries": []}, 422, "body.queries"),
        ("/v1/nowhere", {}, 404, "Not Found"),
        ("/v1/memories/files", {"no": "memory"}, 422, "damaged or no memory file"),
    ],
)
def test_bad_requests_are_told_why(
    client: TestClient, served: str, path: str, body: dict[str, Any], status: int, words: str
) -> None:
    body = {key: served if value == "HERE" else value for key, value in body.items()}
    sent = json.dumps(body).encode()
    refused(client.post(path, content=sent, headers={"Content-Type": "application/json"}), status, words)


def test_a_name_that_is_taken_and_a_pin_are_conflicts(client: TestClient, served: str) -> None:
    entry = written(client, served, name="notes")
    other = {"text": "b1:c2", "checkpoint": served, "name": "notes"}
    refused(client.post("/v1/memories", json=other), 409, "taken")
    client.app.state.store.pin(entry["id"])
    refused(client.delete("/v1/memories/notes"), 409, "pinned")


def test_the_client_speaks_all_of_it(client: TestClient, served: str) -> None:
    mine = Client("http://127.0.0.1:8000")
    mine._http = client
    client.base_url = "http://127.0.0.1:8000/v1/"
    told: list[Any] = []
    entry = mine.write(TEXT, served, name="a b", tags=["x"], steps=1, on_step=lambda *step: told.append(step[:2]))
    assert told == [(0, 1), (1, 1)]
    assert entry == mine.get("a b") == mine.list(tags=["x"])[0]
    assert mine.ask("a b", "a7") == mine.ask("a b", ["k2", "a7"])[1]
    assert mine.checkpoints() == [served]
    assert mine.checkpoint(served, seed=1)["example"] != mine.checkpoint(served)["example"]
    assert mine.change("a b", name="c", pinned=True).pinned
    assert mine.change("c", name="a b", pinned=False) == mine.get(entry.id)
    data = mine.download(entry.id)
    mine.delete("a b")
    with pytest.raises(Missing, match="no such memory"):
        mine.get(entry.id)
    assert mine.upload(data, name="back").name == "back"
    with pytest.raises(GradmemError, match="unknown checkpoint"):
        mine.write(TEXT, "none")
    assert mine.append("back", "b1:c2", may_forget=True).current.number == 2


# Who may


def authorized(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_no_key_sees_anothers_memories(served: str, keys: Keys, tmp_path: Path) -> None:
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


def test_keys_are_hashed_and_their_file_is_private(keys: Keys) -> None:
    key = keys.add("one")
    assert key not in keys.path.read_text()
    assert keys.path.stat().st_mode & 0o077 == 0
    assert Keys(keys.path).owner(key) == "one"
    with pytest.raises(GradmemError, match="has a key"):
        keys.add("one")
    with pytest.raises(GradmemError, match="an owner"):
        keys.add("../one")


def test_without_keys_only_loopback_is_served(served: str, keys: Keys, tmp_path: Path) -> None:
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


def test_the_page_is_served_beside_the_api(served: str, keys: Keys, tmp_path: Path) -> None:
    """Its files need no key, and the paths of the API stay the API's."""
    keys.add("one")
    with client_of(served, keys, tmp_path, host="0.0.0.0") as client:
        page = client.get("/")
        assert page.headers["Content-Type"].startswith("text/html")
        assert page.headers["Cache-Control"] == "no-cache"
        for name in re.findall(r'(?:src|href)="([\w.]+)"', page.text):
            assert client.get(f"/{name}").status_code == 200, name
        scripts = client.get("/main.js")
        assert scripts.headers["Content-Type"].startswith("text/javascript")
        assert client.get("/main.js", headers={"If-None-Match": scripts.headers["ETag"]}).status_code == 304
        refused(client.put("/v1/memories"), 401, "a key is needed")
        refused(client.get("/../app.py"), 404, "Not Found")
        refused(client.get("/%2e%2e/app.py"), 404, "Not Found")
    with client_of(served, keys, tmp_path) as client:
        refused(client.put("/v1/memories"), 405, "Method Not Allowed")
        refused(client.post("/"), 404, "Not Found")


def test_answers_tell_browsers_to_stay_here(client: TestClient) -> None:
    """Also answers that refuse: a page of the server loads nothing from elsewhere, and no other page frames it."""
    for answer in (client.get("/"), client.get("/v1/memories"), client.get("/", headers={"Host": "other.example"})):
        policy = dict(part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; "))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert answer.headers["X-Frame-Options"] == "DENY"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


# Limits


def test_too_much_and_too_often(served: str, keys: Keys, tmp_path: Path) -> None:
    with client_of(served, keys, tmp_path, max_body=100, rate=3) as client:
        refused(client.post("/v1/memories", json={"text": "x" * 200, "checkpoint": served}), 413, "at most 100 bytes")
        pieces = iter([b"x" * 60, b"x" * 60])
        refused(client.post("/v1/memories", content=pieces), 413, "at most 100 bytes")
        assert client.get("/v1/memories").status_code == 200
        late = client.get("/v1/memories")
        refused(late, 429, "in a minute")
        assert 1 <= int(late.headers["Retry-After"]) <= 61


def test_a_request_that_does_not_arrive_is_given_up(served: str, keys: Keys, tmp_path: Path) -> None:
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
    served: str, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


def test_a_full_queue_says_when_to_come_back(served: str, keys: Keys, tmp_path: Path) -> None:
    with client_of(served, keys, tmp_path, max_queue=1) as client:
        written(client, served, name="notes")
        engine, gate, inside = client.app.state.engines.loaded[served], threading.Event(), threading.Event()
        held = engine.write(TEXT, steps=0, on_step=lambda *_: (inside.set(), gate.wait(60)))
        inside.wait(60)
        waits = engine.write(TEXT, steps=0)
        answer = client.post("/v1/memories/notes/ask", json={"queries": ["a7"]})
        gate.set()
        refused(answer, 429, "waiting already")
        assert int(answer.headers["Retry-After"]) >= 1
        assert held.result(60)
        assert waits.result(60)


def test_a_request_ends_in_time_and_its_write_with_it(
    served: str, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with client_of(served, keys, tmp_path) as client:
        written(client, served)
    with client_of(served, keys, tmp_path, timeout=0.5) as client:
        slow = {"text": "b1:c2", "checkpoint": served, "steps": 10_000}
        refused(client.post("/v1/memories", json=slow), 504, "longer than a request may")
        assert len(client.get("/v1/memories").json()["memories"]) == 1


# Memory files that lie


def test_a_scale_that_would_spread_is_refused(client: TestClient) -> None:
    import torch
    from safetensors.torch import save

    from gradmem.memory import FORMAT, digest

    tensors = {"memory": torch.ones(1, 30_000, 1, dtype=torch.int8), f"memory{SCALE}": torch.ones(1, 1, 30_000)}
    header = {"format": FORMAT, "version": "1", "sha256": digest(tensors), "records": "[]"}
    refused(client.post("/v1/memories/files", content=save(tensors, header)), 422, "does not fit")


# What operators see


def test_metrics_and_logs_have_no_contents(client: TestClient, served: str, caplog: pytest.LogCaptureFixture) -> None:
    from gradmem.serving.telemetry import JsonLines

    with caplog.at_level("INFO", logger="gradmem.serving"):
        written(client, served, name="secret-name")
        client.post("/v1/memories/secret-name/ask", json={"queries": ["a7"]})
        client.get("/secret-path?secret=query")
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records if record.name == "gradmem.serving"]
    assert [(line["method"], line["path"], line["status"]) for line in lines] == [
        ("POST", "/v1/memories", 201),
        ("POST", "/v1/memories/{ref}/ask", 200),
        ("GET", "other", 404),
    ]
    metrics = client.get("/metrics").text
    assert 'gradmem_requests_total{method="POST",path="/v1/memories/{ref}/ask",status="200"} 1.0' in metrics
    # The number of a request is random, and may spell anything.
    for told in (metrics, json.dumps([{**line, "request": ""} for line in lines])):
        assert not [word for word in ("secret", "Qz", "a7") if word in told]


def test_what_nobody_foresaw_is_500_without_details(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(Store, "list", broken)
    refused(client.get("/v1/memories"), 500, "internal error")
    assert "secret" not in caplog.text
    assert "RuntimeError" in json.dumps([record.__dict__.get("fields") for record in caplog.records])
