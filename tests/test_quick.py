"""`make quick`: the list of tests that it leaves out names tests that are there."""

from __future__ import annotations

from helpers import ROOT
from quick import SLOW_FILES, SLOW_TESTS


def test_what_is_left_out_exists() -> None:
    files = list((ROOT / "tests").rglob("test_*.py"))
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    gone = {name for name in SLOW_TESTS if f"def {name}(" not in text} | SLOW_FILES - {file.name for file in files}
    assert not gone, "renamed or deleted: take these names out of tests/quick.py"
