"""Model cards: each checkpoint has one that is true, and files of a model keep theirs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import gradmem
from gradmem import MemoryModel
from gradmem.model.packaged import checkpoint_path

NAMES = gradmem.checkpoint_names()


def card_of(directory: Path | None) -> ModelCard:
    assert directory is not None
    return ModelCard((directory / "README.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_a_card_says_what_the_hub_and_a_reader_ask(name: str) -> None:
    card = card_of(checkpoint_path(name))
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "gradmem")
    assert f"\n# {name}\n" in card.content
    for part in ("## Results", "## Training", "## Limits", "## Licence"):
        assert f"\n{part}" in card.content
    results = card.content.partition("## Results")[2].partition("## Training")[0]
    assert re.search(rf"`gradmem eval\s{name} .*?`", results, re.DOTALL)
    assert "control: unwritten" in results
    assert "control: memories swapped" in results


@pytest.mark.parametrize("name", sorted({*NAMES} - {"english", "english-pooled"}))  # those are asked in tests/system
def test_the_example_of_a_card_answers_as_it_says(name: str) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", card_of(checkpoint_path(name)).content, re.DOTALL)
    *lines, last = code.strip().splitlines()
    names: dict[str, Any] = {}
    exec("\n".join(lines), names)
    question, answer = last.split("  # ")
    assert repr(eval(question, names)) == answer


def test_saving_keeps_a_card_that_is_there(tmp_path: Path) -> None:
    directory = checkpoint_path("kv-16")
    assert directory is not None
    shutil.copytree(directory, tmp_path / "own")
    written = (tmp_path / "own" / "README.md").read_bytes()
    model = MemoryModel.from_pretrained(tmp_path / "own")
    assert model.fingerprints == gradmem.load("kv-16").fingerprints
    model.save_pretrained(tmp_path / "own")
    assert (tmp_path / "own" / "README.md").read_bytes() == written


def test_a_new_checkpoint_gets_a_card(tiny: MemoryModel, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path / "new")
    card = card_of(tmp_path / "new")
    assert card.data.library_name == "gradmem"
    assert "gradmem.load(" in card.text
    assert "More Information Needed" not in card.text
    assert MemoryModel.from_pretrained(tmp_path / "new").fingerprints == tiny.fingerprints
