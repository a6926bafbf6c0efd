"""lm-evaluation-harness, where it need not be installed; `tests/system/test_lm_eval.py` runs it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from gradmem import GradmemError
from helpers import ROOT

EXAMPLE = ROOT / "examples" / "lm_eval"


def test_without_the_harness_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lm_eval", "lm_eval.__main__"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "gradmem.lm_eval.model", raising=False)
    with pytest.raises(GradmemError, match=r"pip install 'gradmem\[lm-eval\]'"):
        importlib.import_module("gradmem.lm_eval.model")


def test_the_reports_of_the_example_are_those_that_its_program_makes() -> None:
    spec = importlib.util.spec_from_file_location("make_reports", EXAMPLE / "make_reports.py")
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    assert Path(EXAMPLE / "reports.jsonl").read_text().splitlines() == program.lines()
