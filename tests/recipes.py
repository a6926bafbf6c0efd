"""A recipe that trains in a second, and the log of a run."""

from __future__ import annotations

import copy
import csv
from pathlib import Path

import torch

from gradmem.training import Recipe, Stage

TASK = {"name": "kv", "pairs": 2, "key_length": 1, "value_length": 1, "alphabet": 8}
BACKBONE = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.25,
}
METHOD = {"name": "gradmem", "n_mem": 2, "write_steps": 1, "learn_inner_lr": True, "write_head": "random"}


def recipe(steps: int = 12, **changes: object) -> Recipe:
    stages = [
        Stage(max_steps=steps // 2, write_steps=[1], batch_size=4, warmup_steps=2),
        Stage(max_steps=steps - steps // 2, write_steps=[1, 2], batch_size=4, warmup_steps=2, decay_steps=steps // 4),
    ]
    # Measured choices could differ between two runs that are to be equal.
    settled = {"strategy": "recompute", "micro_batch_size": 8, "save_every": 3, "device": "cpu", "precision": "fp32"}
    fields = {"task": TASK, "backbone": BACKBONE, "method": METHOD, "stages": stages, **settled}
    return Recipe(**{**copy.deepcopy(fields), **changes})


def log(output: Path) -> list[dict[str, str]]:
    with (output / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
