"""Metrics and logs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient
from tests.serving.requesting import refused, written

from gradmem.store import Store


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
