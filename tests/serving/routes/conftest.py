"""A server of a plain language model, with a memory called `notes`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from chat_models import save_model
from gradmem import MemoryModel

if TYPE_CHECKING:  # the packages of a server may be absent
    from starlette.testclient import TestClient


@dataclass
class Plain:
    """The server of a language model whose tokens are bytes.

    Attributes
    ----------
    client : TestClient
    name : str
    letters : dict
        A bias with which it writes small letters only.
    """

    client: TestClient
    name: str
    letters: dict[str, float]

    @property
    def model(self) -> MemoryModel:
        """The model in the server."""
        return self.client.app.state.engines.loaded[self.name].model  # type: ignore[attr-defined]

    def post(self, path: str, **fields: Any) -> Any:
        """Ask `notes`."""
        return self.client.post(f"/v1/{path}", json={"model": f"{self.name}:notes", **fields})

    def chat(self, **fields: Any) -> Any:
        """Ask `notes` in a conversation, for letters."""
        asked = {"messages": [{"role": "user", "content": "Who signed?"}], "logit_bias": self.letters}
        return self.post("chat/completions", **{**asked, **fields})


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plain]:
    """The server of a language model."""
    from tests.serving.requesting import client_of

    from gradmem.serving.api_keys import ApiKeys

    folder = tmp_path_factory.mktemp("plain")
    name = save_model(folder / "lm")
    with client_of(name, ApiKeys(folder / "keys.json"), folder) as client:
        new = {"text": "Ann signed the report.", "checkpoint": name, "name": "notes"}
        assert client.post("/v1/memories", json=new).status_code == 201
        encode = client.app.state.engines.loaded[name].model.task.encode
        yield Plain(client, name, {str(encode(letter)[0]): 50.0 for letter in "abcdefghijklmnopqrstuvwxyz"})
