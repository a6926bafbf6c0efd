"""The sweep over pairs and steps."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from gradmem.cli.main import main
from gradmem.errors import GradmemError
from gradmem.evaluation import evaluate
from gradmem.experiments import sweep as module
from gradmem.experiments.sweep import sweep
from gradmem.model import MemoryModel


def test_steps_are_chosen_on_validation_and_measured_on_test(
    tiny: MemoryModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would be best on the test contexts has no say."""
    best = {"valid": {1: 0.1, 3: 0.7, 5: 0.7, 8: 0.9}, "test": {1: 0.9, 3: 0.2, 5: 0.3, 8: 0.4}}

    def scored(model: MemoryModel, steps: Any, samples: int, seed: int, split: Any, task: Any, **rest: Any) -> Any:
        results = evaluate(model, [*steps], samples, seed, split, task, **rest)
        for result in results:
            result.exact_match = best[split].get(result.steps, 0.0)
        return results

    monkeypatch.setattr(module, "evaluate", scored)
    (point,) = sweep(tiny, [2], range(10), samples=4, valid_samples=3)
    assert (point.few, point.best) == (3, 8)
    rows = point.to_dicts()
    assert [row["steps"] for row in rows] == list(range(10))
    assert [row["steps"] for row in rows if row["chosen_of_few"]] == [3]
    assert [row["exact_match"] for row in rows if row["chosen_of_all"]] == [0.4]
    assert {row["samples"] for row in rows} == {4}
    assert {row["split"] for row in rows} == {"test"}
    assert {row["swapped_steps"] for row in rows} == {8}


def test_sweep_is_evaluation(tiny: MemoryModel) -> None:
    points = sweep(tiny, [2, 4], [0, 1, 3], samples=5, valid_samples=2)
    assert [point.pairs for point in points] == [2, 4]
    assert [point.bits for point in points] == pytest.approx([2 * 4 * math.log2(62), 4 * 4 * math.log2(62)])
    for point in points:
        wanted = evaluate(tiny, [0, 1, 3], 5, 1, "test", {"pairs": point.pairs}, swapped_steps=point.best)
        assert [result.to_dict() for result in point.results.values()] == [result.to_dict() for result in wanted]
        assert point.trained_steps == 2


def test_a_sweep_needs_steps(tiny: MemoryModel) -> None:
    with pytest.raises(GradmemError, match="above 0"):
        sweep(tiny, [2], [0])


def test_command(tiny: MemoryModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.save_pretrained(tmp_path / "tiny")
    names = {
        "--json": "rows.json",
        "--csv": "rows.csv",
        "--figure": "pairs.png",
        "--heatmap": "steps.png",
        "--bits": "bits.png",
    }
    files = [part for option, name in names.items() for part in (option, str(tmp_path / name))]
    given = ["--pairs", "2,32", "--steps", "0..3", "--samples", "3", "--valid-samples", "2"]
    twice = [str(tmp_path / "tiny")] * 2
    assert main(["sweep", *twice, *given, *files]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 2 * 2 * 4
    with (tmp_path / "rows.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["exact_match"]) for line in lines] == [row["exact_match"] for row in rows]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("pairs.png", "steps.png", "bits.png"))
    assert "unwritten" in capsys.readouterr().out


def test_contexts_that_do_not_fit_are_refused(tiny: MemoryModel, tmp_path: Path, capsys: Any) -> None:
    tiny.save_pretrained(tmp_path / "tiny")
    assert main(["sweep", str(tmp_path / "tiny"), "--pairs", "200", "--steps", "1"]) == 2
    assert "the limit" in capsys.readouterr().err
