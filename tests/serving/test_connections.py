"""Idle connections make room for others, on real sockets."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi")
import uvicorn

from gradmem.serving import connections
from gradmem.serving.connections import Connection


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
    monkeypatch.setattr(connections, "IDLE_SECONDS", 1.0)
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
    monkeypatch.setattr(connections, "IDLE_SECONDS", 60.0)
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
    assert json.loads(body)["error"]["code"] == "bad_request"
