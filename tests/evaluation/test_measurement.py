"""Measuring exact match, with controls."""

from __future__ import annotations

from pathlib import Path

import pytest

import gradmem
from gradmem import GradmemError
from gradmem.cli.training import train
from gradmem.evaluation import evaluate
from gradmem.model import MemoryModel
from recipes import BACKBONE, METHOD, TASK, recipe


def test_evaluate_agrees_with_asking_one_by_one(tmp_path: Path) -> None:
    """Teacher-forced exact match is the exact match of greedy generation, counted by hand."""
    train(recipe(60), tmp_path / "run")
    model = gradmem.load(tmp_path / "run" / "checkpoint")
    result = evaluate(model, [1], samples=20, seed=5)[0]
    batch = model.task.batch("test", 0, 20, 5)
    right = []
    for ids in batch.context.ids:
        text = model.task.tokenizer.decode(ids)
        memory = model.write(text, 1)
        truth = model.task.examples(text)
        answers = memory.ask([key for key, _ in truth])
        right.append(sum(a == v for a, (_, v) in zip(answers, truth, strict=True)) / len(truth))
    assert result.exact_match == pytest.approx(sum(right) / len(right))
    assert result.ci95[0] <= result.exact_match <= result.ci95[1]
    assert result.exact_match > 0


def test_evaluate_controls_and_steps(tmp_path: Path) -> None:
    model = MemoryModel.from_spec(TASK, BACKBONE, METHOD)
    results = evaluate(model, [2, 0, 1], samples=6, seed=2)
    assert [result.steps for result in results] == [0, 1, 2]
    assert {result.unwritten for result in results} == {results[0].exact_match}
    row = results[2].to_dict()
    assert {"pairs", "steps", "exact_match", "ci95", "samples", "seed", "parameters", "n_mem", "d", "bytes"} <= set(row)
    assert row["bytes"] == 2 * 16 * 4
    assert row["unwritten_ci95"] == results[0].ci95  # nothing written is the memory after no steps
    assert row["swapped_ci95"][0] <= row["swapped"] <= row["swapped_ci95"][1]
    with pytest.raises(GradmemError, match="limit"):
        evaluate(model, [1], samples=2, task={"pairs": 32, "key_length": 2})
