"""Health and readiness: what a proxy asks before it sends requests to a server."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.testclient import TestClient
from tests.serving.requesting import client_of, refused, written

from gradmem.serving import operation
from gradmem.serving.api_keys import ApiKeys
from gradmem.serving.engine import Engine


def test_a_server_is_ready_while_its_store_can_be_used(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operation, "READY_SECONDS", 0.0)
    assert client.get("/readyz").json() == {"status": "ready"}
    client.app.state.store.close()  # its connections remember the file
    (tmp_path / "store.db").write_bytes(b"no database" * 1000)
    refused(client.get("/readyz"), 503, "the store cannot be used")
    assert client.get("/healthz").json() == {"status": "ok"}


def test_a_server_whose_engine_is_stuck_or_closed_is_not_ready(
    client: TestClient, served: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operation, "READY_SECONDS", 0.0)
    written(client, served)
    assert client.get("/readyz").is_success
    monkeypatch.setattr(Engine, "stuck", lambda *_: True)
    refused(client.get("/readyz"), 503, "has made no progress for 300 s")
    monkeypatch.undo()
    monkeypatch.setattr(operation, "READY_SECONDS", 0.0)
    client.portal.call(client.app.state.engines.close)
    refused(client.get("/readyz"), 503, "the server is shutting down")


def test_checks_succeed_in_a_flood_and_need_no_key(served: str, keys: ApiKeys, tmp_path: Path) -> None:
    keys.add("one")
    with client_of(served, keys, tmp_path, host="0.0.0.0", rate=1) as client:
        answers = [client.get(path).status_code for path in ("/readyz", "/healthz", "/docs", "/docs", "/readyz")]
    assert answers == [200, 200, 200, 429, 200]


def test_a_server_that_is_watched_says_so_before_it_ends(client: TestClient, served: str) -> None:
    written(client, served)
    readiness = client.app.state.readiness
    assert not readiness.watched
    assert client.get("/readyz").is_success
    assert readiness.watched
    readiness.leaving = True
    refused(client.get("/readyz"), 503, "the server is shutting down")
    # Everything else is still served.
    assert client.get("/v1/memories").is_success
    assert client.get("/healthz").json() == {"status": "ok"}
