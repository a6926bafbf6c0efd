"""Two processes that share out a model: its training by FSDP2, and its layers by tensor parallelism."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from gradmem.cli.training import train
from gradmem.training.state import states
from recipes import log, recipe

HERE = Path(__file__).parent
CONFIG = resources.files("gradmem") / "training" / "accelerate" / "fsdp2.yaml"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_sharded_training_learns_what_one_process_learns(tmp_path: Path) -> None:
    """Second order through two write steps, in parts of a batch, stopped and resumed: the same weights at the end."""
    small = recipe(4, optimizer="adamw", seed=3, write_loss_weight=0.3, micro_batch_size=1, valid_samples=4)
    train(small, tmp_path / "one")
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(dataclasses.asdict(small)))
    launch = [Path(sys.executable).with_name("accelerate"), "launch", "--config_file", str(CONFIG)]
    run = [*launch, str(HERE / "sharded_on_cpu.py"), "train", str(file), "--output", str(tmp_path / "two")]
    cut = subprocess.run(run, env={**ENVIRONMENT, "STOP_AT": "2"}, capture_output=True, text=True, check=False)
    assert [path.name for path in states(tmp_path / "two" / "states")] == ["step-00000003"], cut.stderr
    subprocess.run(run, env=ENVIRONMENT, capture_output=True, check=True)
    whole, sharded = (load_file(tmp_path / name / "checkpoint" / "model.safetensors") for name in ("one", "two"))
    assert whole.keys() == sharded.keys()
    for name in whole:
        assert torch.allclose(whole[name], sharded[name], rtol=1e-4, atol=1e-6), name
    for a, b in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        for name in ("loss", "write_loss", "grad_norm"):
            assert abs(float(a[name]) / float(b[name]) - 1) < 1e-4, name
    one, two = (json.loads((tmp_path / name / "valid-2.json").read_text()) for name in ("one", "two"))
    assert [row["exact_match"] for row in one] == [row["exact_match"] for row in two]


def test_a_model_split_by_its_own_plan_reads_and_writes_the_same(tmp_path: Path) -> None:
    torch.manual_seed(1)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, initializer_range=0.25)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run += [str(HERE / "tensor_parallel.py"), str(tmp_path)]
    done = subprocess.run(run, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
