"""`gradmem serve` as a process on a real socket: OpenAI's client, leaving, ending."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import openai
import pytest
from served import Server

from gradmem import Client, load
from gradmem.store import Store

TEXT = "a7:Qz\nk2:9f\nzz:aa"
LONG = 10_000
CLOSING = "the server is shutting down"
SHORT_GRACE = "from gradmem.serving import connections; connections.SHUTDOWN_SECONDS = 0.5"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server on loopback."""
    server = Server(tmp_path, "kv-16")
    yield server
    server.process.kill()
    server.process.wait()


def eventually(condition: object) -> bool:
    """Whether something becomes true."""
    until = time.monotonic() + 60
    while not condition() and time.monotonic() < until:  # type: ignore[operator]
        time.sleep(0.05)
    return bool(condition())  # type: ignore[operator]


def test_openai_client_asks_a_memory(server: Server) -> None:
    entry = Client(server.url).write(TEXT, "kv-16", name="notes")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["kv-16", "kv-16:notes"]
    wanted = load("kv-16").write(TEXT).answer("k2")
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "k2"}]
    for model, extra in (("kv-16:notes", {}), (f"kv-16:{entry.id}", {}), ("kv-16", {"memory_id": "notes"})):
        found = client.chat.completions.create(model=model, messages=asked, extra_body=extra)
        assert found.choices[0].message.content == wanted.text == "9f"
        assert found.choices[0].finish_reason == "stop"
        assert found.choices[0].gradmem["logprob"] == pytest.approx(wanted.logprob, abs=1e-4)
    with client.chat.completions.create(model="kv-16:notes", messages=asked, stream=True) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "9f"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "stop"
    assert len(chunks) > 2
    with pytest.raises(openai.NotFoundError, match="no such memory"):
        client.chat.completions.create(model="kv-16:other", messages=asked)
    with pytest.raises(openai.BadRequestError, match="no memory is named"):
        client.chat.completions.create(model="kv-16", messages=asked)


def test_a_client_that_leaves_ends_its_write(server: Server) -> None:
    wanted = {"text": TEXT, "checkpoint": "kv-16", "steps": LONG, "stream": True}
    with httpx2.stream("POST", f"{server.url}/v1/memories", json=wanted, timeout=60) as answer:
        assert next(answer.iter_lines()) == "event: step"
    # Another write has its turn long before ten thousand steps are over.
    assert eventually(lambda: server.metric("gradmem_requests_active") == 1)  # the one that asks
    client = Client(server.url)
    client.write(TEXT, "kv-16")
    assert len(client.list()) == 1


def test_what_was_accepted_is_finished_when_the_server_ends(server: Server) -> None:
    wanted = {"text": TEXT, "checkpoint": "kv-16", "steps": 8, "stream": True}
    with httpx2.stream("POST", f"{server.url}/v1/memories", json=wanted, timeout=60) as answer:
        lines = answer.iter_lines()
        assert next(lines) == "event: step"
        server.process.send_signal(signal.SIGTERM)
        assert "event: memory" in list(lines)
    assert server.process.wait(60) in (0, -signal.SIGTERM)
    assert "Qz" not in server.log.read_text()


def test_a_server_that_a_proxy_watches_serves_until_the_proxy_knows(server: Server) -> None:
    """A connection that is made when a server stops listening is lost, so nobody may be making one then."""
    assert httpx2.get(f"{server.url}/readyz").is_success
    server.process.send_signal(signal.SIGTERM)
    assert eventually(lambda: httpx2.get(f"{server.url}/readyz").status_code == 503)
    assert Client(server.url).write(TEXT, "kv-16").current.number == 1
    assert server.process.wait(60) in (0, -signal.SIGTERM)


def test_ctrl_c_waits_for_no_proxy(server: Server) -> None:
    answers = [httpx2.get(f"{server.url}/readyz").text]
    server.process.send_signal(signal.SIGINT)

    def gone() -> bool:
        try:
            answers.append(httpx2.get(f"{server.url}/readyz").text)
        except httpx2.TransportError:
            return True
        return False

    assert eventually(gone)
    assert not [answer for answer in answers if "about to end" in answer]
    server.process.wait(60)


def test_who_still_waits_at_the_end_is_told_and_nothing_is_half_done(tmp_path: Path) -> None:
    server = Server(tmp_path, "kv-16", before=SHORT_GRACE)
    client = Client(server.url)
    client.write(TEXT, "kv-16", name="kept")
    wanted = {"text": TEXT, "checkpoint": "kv-16", "steps": LONG}
    with ThreadPoolExecutor(3) as pool:
        with httpx2.stream("POST", f"{server.url}/v1/memories", json=wanted | {"stream": True}, timeout=60) as answer:
            lines = answer.iter_lines()
            assert next(lines) == "event: step"
            others = [pool.submit(httpx2.post, f"{server.url}/v1/memories", json=wanted, timeout=60) for _ in range(3)]
            assert eventually(lambda: server.metric("gradmem_requests_active") >= 4)
            server.process.send_signal(signal.SIGTERM)
            *_, event, data, _ = lines  # to a proper end
        assert (event, json.loads(data.removeprefix("data: "))["error"]["message"]) == ("event: error", CLOSING)
        for other in others:
            assert other.result().status_code == 503
            assert other.result().json()["error"]["message"] == CLOSING
            assert int(other.result().headers["Retry-After"]) > 0
    assert server.process.wait(60) in (0, -signal.SIGTERM)
    assert "Traceback" not in server.log.read_text()
    with Store(tmp_path / "store.db") as store:
        assert [entry.name for entry in store.list()] == ["kept"]


def test_writes_whose_clients_left_take_nobodys_place(server: Server) -> None:
    """More of them than may wait: they neither run nor count."""
    client = Client(server.url)
    client.write(TEXT, "kv-16", name="notes")
    body = json.dumps({"text": TEXT, "checkpoint": "kv-16", "steps": LONG}).encode()
    head = b"POST /v1/memories HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    port = int(server.url.rpartition(":")[2])
    for _ in range(2):
        leaving = [socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(150)]
        for connection in leaving:
            connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert eventually(lambda: server.metric("gradmem_requests_active") > 100)
        for connection in leaving:
            connection.close()
        assert eventually(lambda: server.metric("gradmem_requests_active") == 1)  # the one that asks
        assert client.ask("notes", "a7").text == "Qz"
    assert client.write("b1:c2", "kv-16").current.number == 1


def test_other_addresses_need_keys(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gradmem"]
    given = {"env": Server.environment(tmp_path), "capture_output": True, "text": True, "timeout": 120}
    bare = subprocess.run([*command, "serve", "--host", "0.0.0.0", "--port", "0"], **given)
    assert (bare.returncode, bare.stdout) == (2, "")
    assert "make a key first" in bare.stderr
    key = subprocess.run([*command, "keys", "add", "me"], **given).stdout.strip()
    server = Server(tmp_path, "kv-16", "--host", "0.0.0.0")
    try:
        with pytest.raises(Exception, match="a key is needed"):
            Client(server.url).list()
        assert Client(server.url, key).list() == []
        assert key not in (tmp_path / "keys.json").read_text()
    finally:
        server.stop()


def test_bytes_that_are_no_http_harm_nothing(server: Server) -> None:
    port = int(server.url.rpartition(":")[2])
    for sent in (
        b"\x00" * 1000,
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/memories HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.sendall(sent)
            assert not connection.recv(100).startswith(b"HTTP/1.1 5")
    assert httpx2.get(f"{server.url}/healthz").json() == {"status": "ok"}
    assert "Traceback" not in server.log.read_text()
