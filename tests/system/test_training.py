"""`gradmem train` in processes of its own: one that is killed, and two that share a batch."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from gradmem.cli.training import train
from gradmem.model import MemoryModel
from gradmem.training import Recipe
from gradmem.training.state import states
from recipes import recipe, same


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "checkpoint" / "model.safetensors")


def command(recipe: Recipe, folder: Path, *options: str) -> list[str]:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(dataclasses.asdict(recipe)))
    return [sys.executable, "-m", "gradmem", "train", str(file), *options]


def test_killed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    long = recipe(40)
    train(long, tmp_path / "whole")
    run = command(long, tmp_path, "--output", str(tmp_path / "cut"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(run, env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not states(tmp_path / "cut" / "states"):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    subprocess.run(run, env=environment, check=True, capture_output=True)
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


def test_two_processes_learn_what_one_with_the_joint_batch_learns(tmp_path: Path) -> None:
    """Same weights after some steps means the same gradients at each of them."""
    small = recipe(4, optimizer="adamw", seed=3)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    train(small, tmp_path / "1")
    run = command(small, tmp_path, "--output", str(tmp_path / "2"), "--processes", "2")
    subprocess.run(run, env=environment, check=True, capture_output=True)
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    assert one.keys() == two.keys()
    for name in one:
        assert torch.allclose(one[name], two[name], atol=2e-5), name
    fresh = MemoryModel.from_spec(small.task, small.backbone, small.method).method.state_dict()
    assert any(not torch.allclose(fresh[name], one[name], atol=1e-3) for name in one)
