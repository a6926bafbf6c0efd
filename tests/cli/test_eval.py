"""`gradmem eval` with several tasks, with generated samples, and with wrong options of a task."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from babi_solver import SMALL
from gradmem.cli.main import main
from helpers import text_model


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    """A checkpoint and data of two bAbI tasks."""
    text_model({"name": "babi", "tasks": "qa1"}).save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "data").mkdir()
    for task in ("qa1", "qa7"):
        for split in ("train", "test"):
            text = SMALL * 2 if task == "qa7" else SMALL
            (tmp_path / "data" / f"{task}_x_{split}.txt").write_text(text)
    return tmp_path


def test_eval_measures_each_task_separately(stories: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", f"{stories}/data", "--tasks", "qa1,qa7", "--steps", "0,1", "--json", f"{stories}/e.json"]
    assert main(["eval", f"{stories}/checkpoint", *options]) == 0
    rows = json.loads((stories / "e.json").read_text())
    assert [(row["task"], row["steps"], row["samples"], row["queries"]) for row in rows] == [
        ("qa1", 0, 3, 4),
        ("qa1", 1, 3, 4),
        ("qa7", 0, 6, 8),
        ("qa7", 1, 6, 8),
    ]
    assert {"exact_match", "ci95", "unwritten", "swapped", "source"} <= set(rows[0])
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("control: unwritten") == shown.count("control: swapped") == 2
    assert "qa7: 6 of 6 test contexts occur word for word in the training files" in shown


def test_generated_contexts_are_labelled(stories: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", f"{stories}/checkpoint", "--samples", "4", "--json", f"{stories}/e.json"]) == 0
    assert [row["source"] for row in json.loads((stories / "e.json").read_text())] == ["generated"]
    assert "(generated)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--taskz", "qa1"], "unknown babi task option 'taskz': did you mean 'tasks'"),
        (["--tasks", "qa99"], "unknown bAbI task 'qa99'"),
        (["--pairs", "4"], "unknown babi task option 'pairs'"),
        (["--data", "/no/such/place"], "no data at /no/such/place"),
        (["--tasks", "qa3", "--samples", "2"], "contexts have .* the limit of"),
    ],
)
def test_bad_task_options(stories: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    shallow = json.loads((stories / "checkpoint" / "config.json").read_text())
    shallow["backbone"]["max_position_embeddings"] = 32
    (stories / "checkpoint" / "config.json").write_text(json.dumps(shallow))
    assert main(["eval", f"{stories}/checkpoint", *options]) == 2
    assert re.search(message, capsys.readouterr().err)
