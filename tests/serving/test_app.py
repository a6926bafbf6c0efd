"""The application as a whole: its page, its end, and its store."""

from __future__ import annotations

import re
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from tests.serving.requesting import TEXT, authorized, client_of, refused, written

from gradmem.serving.api_keys import ApiKeys
from gradmem.serving.app import create_app
from gradmem.serving.settings import Settings
from gradmem.store import Store


def test_an_application_may_start_again(served: str, keys: ApiKeys, tmp_path: Path) -> None:
    """Whoever mounts it may end and begin its lifespan: what it closed then, it opens then."""
    client = client_of(served, keys, tmp_path)
    for _ in range(2):
        with client:
            ref = written(client, served)["id"]
            assert client.post(f"/v1/memories/{ref}/ask", json={"queries": ["a7"]}).status_code == 200


def test_the_page_is_served_beside_the_api(served: str, keys: ApiKeys, tmp_path: Path) -> None:
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


def test_the_page_of_the_api_is_of_this_server(client: TestClient) -> None:
    page = client.get("/docs")
    assert page.headers["Content-Type"].startswith("text/html")
    assert "http" not in page.text.replace("HTTP", "").replace("http-equiv", "")
    for name in ("docs.js", "style.css", "openapi.json"):
        assert client.get(f"/{name}").status_code == 200


@pytest.mark.parametrize(
    "value", ["bytes=5-1", "bytes=a-b", "bytes=999999999-", "lines=1-2", "bytes=0-0,2-3", "bytes="]
)
def test_ranges_are_not_known(client: TestClient, served: str, value: str) -> None:
    written(client, served, name="notes")
    for path in ("/main.js", "/docs", "/", "/v1/memories/notes/file"):
        whole, ranged = client.get(path), client.get(path, headers={"Range": value})
        assert (ranged.status_code, ranged.content) == (200, whole.content)


def test_a_full_queue_says_when_to_come_back(served: str, keys: ApiKeys, tmp_path: Path) -> None:
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
        while not engine._past_deadline():
            threading.Event().wait(0.01)
        gate.set()
        closing.result(60)
        for answer in answers:
            refused(answer.result(60), 503, "the server is shutting down")
    assert held.exception(60) is not None
    refused(client.post("/v1/memories", json=waiting), 503, "the server is shutting down")
    assert len(client.get("/v1/memories").json()["memories"]) == 1


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


def test_a_key_keeps_as_much_as_its_quota_says(served: str, keys: ApiKeys, tmp_path: Path) -> None:
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
