"""The built wheel works outside the repository, with the checkpoints in it and nothing of the network."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from helpers import ROOT

QUESTION = """
import gradmem, pathlib
assert "site" in gradmem.__file__, gradmem.__file__
print(gradmem.load("kv-32").write("a7:Qz\\nk2:9f\\nzz:aa").ask("a7"))
print(gradmem.checkpoint_names())
"""
MOST_BYTES = 30 * 10**6
"""Of a wheel: what people install before they have seen an answer."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_answers_a_query(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    cache = {"GRADMEM_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, "PYTHONPATH": str(site), **cache}
    done = subprocess.run(
        [sys.executable, "-c", QUESTION], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["Qz", "['babi', 'kv-16', 'kv-32', 'text']"]


def test_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < MOST_BYTES


def test_wheel_holds_the_package_only(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name == "gradmem/py.typed" for name in names)
    assert any(name.startswith("gradmem/recipes/") for name in names)
    page = {path.name for path in (ROOT / "src/gradmem/serving/web").iterdir()}
    assert {"index.html", "style.css", "main.js"} <= page
    assert {f"gradmem/serving/web/{name}" for name in page} <= set(names)
    assert all(name.startswith(("gradmem/", "gradmem-")) for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
