"""A server of a tiny checkpoint, for all tests of the HTTP API."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gradmem import MemoryModel
from gradmem.serving.api_keys import ApiKeys

if TYPE_CHECKING:  # the packages of a server may be absent
    from starlette.testclient import TestClient


@pytest.fixture(scope="module")
def served(tiny: MemoryModel, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Name of a checkpoint that is served."""
    folder = tmp_path_factory.mktemp("served") / "tiny"
    tiny.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def keys(tmp_path: Path) -> ApiKeys:
    """An empty file of keys."""
    return ApiKeys(tmp_path / "keys.json")


@pytest.fixture
def client(served: str, keys: ApiKeys, tmp_path: Path) -> Iterator[TestClient]:
    """A client of a server on loopback."""
    from tests.serving.requesting import client_of

    with client_of(served, keys, tmp_path) as client:
        yield client
