"""RMT and ARMT through training, checkpoint, memory file, questions and evaluation."""

from __future__ import annotations

import copy
import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import gradmem
from gradmem import GradmemError
from gradmem.evaluation import evaluate
from gradmem.model import MemoryModel
from gradmem.training import Recipe, Stage
from gradmem.training.trainer import Trainer
from recipes import BACKBONE, TASK

METHODS: dict[str, dict[str, Any]] = {
    "rmt": {"name": "rmt", "n_mem": 2, "write_head": "random", "reconstruction": True, "residual": True},
    "armt": {"name": "armt", "n_mem": 2, "d_mem": 4, "segment_length": 6},
    "armt-reconstruction": {"name": "armt", "n_mem": 2, "d_mem": 4, "segment_length": 6, "reconstruction": True},
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", METHODS)
def test_train_save_ask(name: str, precision: Any, tmp_path: Path) -> None:
    recipe = Recipe(
        task=TASK,
        backbone=BACKBONE,
        method=METHODS[name],
        stages=[Stage(max_steps=4, write_steps=[1], batch_size=4, warmup_steps=1)],
        write_loss_weight=0.5,
        precision=precision,
        micro_batch_size=2,
        strategy="unroll",
        device="cpu",
        valid_samples=4,
    )
    torch.manual_seed(recipe.seed)
    trained = Trainer(recipe, tmp_path / "run").run()
    with (tmp_path / "run" / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    assert all(math.isfinite(float(row["loss"])) for row in rows)
    reconstructs = METHODS[name].get("reconstruction", False)
    assert all((float(row["write_loss"]) > 0) == reconstructs for row in rows)

    loaded = gradmem.load(tmp_path / "run" / "checkpoint")
    texts = ["a:b\nc:d", "a:e"]
    memory = loaded.write(texts)
    answers = memory.ask([["a", "c"], ["a"]])
    for key, tensor in trained.write(texts).tensors.items():
        assert torch.equal(memory.tensors[key], tensor)
    file = memory.save(tmp_path / "memory.safetensors")
    assert loaded.open(file).ask([["a", "c"], ["a"]]) == answers
    assert gradmem.open(file).ask([["a", "c"], ["a"]]) == answers
    record = memory.receipts[0]
    assert len(record.token_losses) == record.context_tokens
    assert record.steps == 1
    assert len(record.losses) == (2 if name == "rmt" else 1)


@pytest.mark.parametrize("name", METHODS)
def test_training_moves_every_parameter(name: str, tmp_path: Path) -> None:
    """Those of ARMT take turns: keys, queries and strengths have no gradient before values have moved."""
    recipe = Recipe(
        task=TASK,
        backbone=BACKBONE,
        method=METHODS[name] | ({"write_steps": 2} if name == "rmt" else {}),
        stages=[Stage(max_steps=3, write_steps=[2], batch_size=4, warmup_steps=1)] * 2,
        write_loss_weight=0.5,
        micro_batch_size=4,
        strategy="unroll",
        device="cpu",
    )
    trainer = Trainer(recipe, tmp_path / "run")
    before = copy.deepcopy(trainer.model.method.state_dict())
    for _ in range(3):
        trainer.state.micro_batch_size = 4
        trainer._step(recipe.stages[0], [trainer.model.task])
    for key, tensor in trainer.model.method.state_dict().items():
        assert not torch.equal(tensor, before[key]), key


def test_evaluation_of_more_steps_than_there_are_is_refused() -> None:
    model = MemoryModel.from_spec(TASK, BACKBONE, METHODS["armt"])
    assert [result.steps for result in evaluate(model, [0, 1], samples=4)] == [0, 1]
    with pytest.raises(GradmemError, match=r"3 steps were asked for.*at most 1"):
        evaluate(model, [1, 3], samples=4)
