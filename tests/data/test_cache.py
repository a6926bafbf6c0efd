"""The cache of tokenized data: where it is, and what happens to damaged files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gradmem import GradmemError
from gradmem.tasks.text import Text


def test_a_damaged_cache_is_made_again(
    books: str, bytes_tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADMEM_CACHE", str(tmp_path / "cache"))
    whole = Text(bytes_tokenizer, books, chunk_size=10).batch("test", 0, 3).context.ids
    (folder,) = (tmp_path / "cache").iterdir()
    for damage in (lambda file: file.write_bytes(file.read_bytes()[:-40]), Path.unlink):
        damage(folder / "context.npy")
        assert torch.equal(Text(bytes_tokenizer, books, chunk_size=10).batch("test", 0, 3).context.ids, whole)
        assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]


def test_cache_place_follows_the_environment(
    books: str, bytes_tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRADMEM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    Text(bytes_tokenizer, books, chunk_size=10).size("test")
    assert list((tmp_path / "xdg" / "gradmem").iterdir())
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRADMEM_CACHE", str(tmp_path / "file"))
    with pytest.raises(GradmemError, match="set GRADMEM_CACHE"):
        Text(bytes_tokenizer, books, chunk_size=9).size("test")
