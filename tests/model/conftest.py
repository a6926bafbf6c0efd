"""Model files that the tests of loading share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gradmem.tasks.text import byte_tokenizer
from helpers import tiny_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a language model, the same in several files, and a checkpoint."""
    folder = tmp_path_factory.mktemp("made")
    config = LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "lm")
    model.save_pretrained(folder / "shards", max_shard_size="20KB")
    assert len(list((folder / "shards").glob("model-*.safetensors"))) > 1
    for place in ("lm", "shards"):
        byte_tokenizer().save_pretrained(folder / place)
    tiny_model(0).save_pretrained(folder / "checkpoint")
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return shutil.copytree(made, tmp_path / "made")
