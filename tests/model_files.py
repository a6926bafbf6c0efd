"""A language model and a checkpoint in files, to damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gradmem.cli.main import main

METHOD = {"name": "cram", "n_mem": 2, "write_steps": 1}
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TEXT = "a7:Qz\n"


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON file in place."""
    fields = json.loads(file.read_text())
    change(fields)
    file.write_text(json.dumps(fields))


def retensor(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a safetensors file in place."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def refusal(folder: Path, capsys: pytest.CaptureFixture[str], text: str = TEXT) -> str:
    """What the command line says of writing with a model: one line."""
    source = folder.parent / "text.txt"
    source.write_text(text)
    capsys.readouterr()
    assert main(["write", str(folder), str(source), "-o", str(folder.parent / "out")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("gradmem: error: ")
    assert len(line) < 1000
    return line
