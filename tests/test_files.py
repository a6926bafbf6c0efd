"""Directories that appear whole or not at all."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from gradmem.files import atomic_directory


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_directory_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "missing" / "target"
    with atomic_directory(target) as directory:
        (directory / "a").write_text("new")
        assert not target.exists()
    assert names(target) == ["a"]
    assert names(target.parent) == ["target"]


def test_it_replaces_another(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "old").write_text("old")
    with atomic_directory(tmp_path / "target") as directory:
        (directory / "a").write_text("new")
    assert names(tmp_path / "target") == ["a"]
    assert names(tmp_path) == ["target"]


def test_an_error_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "old").write_text("old")
    with suppress(ZeroDivisionError), atomic_directory(tmp_path / "target") as directory:
        (directory / "a").write_text("half")
        raise ZeroDivisionError
    assert names(tmp_path / "target") == ["old"]
    assert names(tmp_path) == ["target"]
