"""Checkpoints that are not in the package: in a clone they are there, elsewhere they are downloaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import gradmem
from gradmem import GradmemError
from gradmem.cli.main import main
from gradmem.files import cache_directory
from gradmem.model.download import download
from gradmem.model.packaged import DOWNLOADABLE
from helpers import ROOT

CLONE = ROOT / "checkpoints"
KEPT = ["babi", "kv-16", "kv-32", "text"]


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The package as in a wheel: in no clone, with an empty cache and no network."""
    monkeypatch.setattr("gradmem.model.packaged.clone", lambda: None)
    monkeypatch.setenv("GRADMEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def request(*given: Any, **options: Any) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr("socket.getaddrinfo", request)
    return tmp_path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what is published, for tests that spoil it."""
    shutil.copytree(CLONE / "kv-64-k1", tmp_path / "source" / "kv-64-k1")
    return tmp_path / "source"


def installed(folder: Path) -> list[str]:
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if "making" in path.name or path.is_file()
    )


def test_a_clone_has_all_that_can_be_downloaded() -> None:
    assert sorted(path.name for path in CLONE.iterdir()) == sorted(DOWNLOADABLE)
    assert gradmem.checkpoint_names() == sorted([*KEPT, *DOWNLOADABLE])


@pytest.mark.parametrize("name", sorted({*DOWNLOADABLE} - {"english"}))  # that takes a language model, in tests/system
def test_download(name: str, elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gradmem.checkpoint_names() == KEPT
    assert main(["download", name, "--source", str(CLONE)]) == 0
    directory = cache_directory() / "checkpoints" / name
    assert capsys.readouterr().out == f"{name}: {directory}\n"
    assert gradmem.checkpoint_names() == sorted([*KEPT, name])
    model = gradmem.load(name)
    assert model.name == name
    assert model.fingerprints == gradmem.load(CLONE / name).fingerprints
    assert main(["download", name]) == 0  # it is there: nothing is asked of the network


def test_from_the_hub(elsewhere: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(source)

    (source / "kv-64-k1" / "modeling.py").touch()
    monkeypatch.setattr("gradmem.model.download.snapshot_download", snapshot)
    directory = download("kv-64-k1")
    ((hub, patterns),) = asked
    assert hub == "gradmem/checkpoints"
    assert "kv-64-k1/model.safetensors" in patterns
    assert all(pattern.startswith("kv-64-k1/") for pattern in patterns)
    files = {path.name for path in directory.iterdir()}
    assert files == {path.name for path in (CLONE / "kv-64-k1").iterdir()}


def test_a_checkpoint_that_is_not_here_says_how_to_get_it(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (elsewhere / "text").write_text("a7:Qz")
    for line in (["write", "kv-64", "text"], ["eval", "kv-64"], ["compare", "kv-64"]):
        assert main(line) == 2
        assert capsys.readouterr().err == (
            "gradmem: error: the checkpoint 'kv-64' is not in the package: run gradmem download kv-64\n"
        )
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        f"checkpoints: {', '.join(KEPT)}",
        f"checkpoints to download: {', '.join(sorted(DOWNLOADABLE))}",
    ]


def test_a_memory_file_says_what_to_download(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as within:
        within.setattr("gradmem.model.packaged.clone", lambda: ROOT)
        gradmem.load("kv-64-k1").write("a7:Qz").save(elsewhere / "m")
    with pytest.raises(GradmemError, match="run gradmem download kv-64-k1"):
        gradmem.open(elsewhere / "m")
    download("kv-64-k1", CLONE)
    assert gradmem.open(elsewhere / "m").ask("a7") == "Qz"


def test_weights_that_are_not_the_published_ones_are_refused(elsewhere: Path, source: Path) -> None:
    weights = source / "kv-64-k1" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    with pytest.raises(GradmemError, match="not the published 'kv-64-k1': nothing was installed"):
        download("kv-64-k1", source)
    assert installed(elsewhere / "cache") == []


@pytest.mark.parametrize(
    ("old", "new"), [('"inner_lr": 1.0', '"inner_lr": 2.0'), ('"rms_norm_eps": ', '"rms_norm_eps": 1')]
)
def test_settings_that_are_not_the_published_ones_are_refused(
    old: str, new: str, elsewhere: Path, source: Path
) -> None:
    config = source / "kv-64-k1" / "config.json"
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))
    with pytest.raises(GradmemError, match="not the published 'kv-64-k1': nothing was installed"):
        download("kv-64-k1", source)
    assert installed(elsewhere / "cache") == []


@pytest.mark.parametrize("text", ["{", '{"format": 1}'])
def test_a_config_that_does_not_load_is_refused(text: str, elsewhere: Path, source: Path) -> None:
    (source / "kv-64-k1" / "config.json").write_text(text)
    with pytest.raises(GradmemError, match="source/kv-64-k1"):
        download("kv-64-k1", source)
    assert installed(elsewhere / "cache") == []


def test_nothing_is_left_when_the_disk_is_full(elsewhere: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def copy(origin: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", copy)
    with pytest.raises(GradmemError, match=r"cannot write .*kv-64-k1 \(No space left on device"):
        download("kv-64-k1", source)
    assert installed(elsewhere / "cache") == []


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            "kv-64-k",
            "unknown checkpoint 'kv-64-k': did you mean 'kv-64-k1'? known: babi, english, english-pooled, kv-128",
        ),
        ("../kv-64", "unknown checkpoint '../kv-64'"),
        ("kv-64 --source nowhere/at/all", "there is no directory nowhere/at/all"),
        ("kv-64 --source .", ". has no checkpoint 'kv-64': it needs a folder of this name with model.safetensors"),
        ("kv-64", "cannot download 'kv-64' from gradmem/checkpoints (--source takes another hub name, or a directory)"),
    ],
)
def test_one_line(line: str, told: str, elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["download", *line.split()]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"gradmem: error: {told}")
    assert len(shown.err.splitlines()) == 1
