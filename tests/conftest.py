"""Fixtures that all tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import standin  # noqa: F401 - makes its device known before anything is differentiated
from gradmem.model import MemoryModel
from helpers import tiny_model

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep tokenized data out of the user's cache, but share it among tests."""
    monkeypatch.setenv("GRADMEM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every test's memories out of the user's store."""
    monkeypatch.setenv("GRADMEM_STORE", str(tmp_path / "own" / "store.db"))


@pytest.fixture(scope="session")
def tiny() -> MemoryModel:
    """An untrained KV model."""
    return tiny_model(0)


@pytest.fixture(scope="session")
def other() -> MemoryModel:
    """The same architecture with other weights."""
    return tiny_model(1)
