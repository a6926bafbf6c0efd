"""The client in Python."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient
from tests.serving.requesting import TEXT

from gradmem import Client, GradmemError
from gradmem.errors import Missing


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
