"""Fixtures that all tests share."""

from __future__ import annotations

import string
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from quick import mark_quick

if TYPE_CHECKING:
    from gradmem.model import MemoryModel


def pytest_collectstart() -> None:
    """Import PyTorch in the processes that run tests, and not in the one that hands them out, which takes seconds."""
    import torch

    import standin  # noqa: F401 - makes its device known before anything is differentiated

    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_quick(items)


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
    from helpers import tiny_model

    return tiny_model(0)


@pytest.fixture(scope="session")
def other() -> MemoryModel:
    """The same architecture with other weights."""
    from helpers import tiny_model

    return tiny_model(1)


@pytest.fixture(scope="session")
def bytes_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with a tokenizer as GPT-2's is, but of single bytes: its one special token begins, ends and pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizer")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate([*letters, "<|endoftext|>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    named = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def books(tmp_path: Path) -> str:
    """A directory with texts of 47 and 100 bytes for training, and 35 for test."""
    for folder, sizes in {"train": [47, 100], "test": [35]}.items():
        (tmp_path / folder).mkdir()
        for i, size in enumerate(sizes):
            text = "".join(string.ascii_letters[(i + j * 7) % 52] for j in range(size))
            (tmp_path / folder / f"{i}.txt").write_text(text)
    return str(tmp_path)


@pytest.fixture
def small_babi(tmp_path: Path) -> Path:
    """A directory with qa1 in small."""
    from babi_solver import SMALL

    (tmp_path / "qa1_single_train.txt").write_text(SMALL)
    (tmp_path / "qa1_single_test.txt").write_text(SMALL.replace("garden", "kitchen"))
    return tmp_path
