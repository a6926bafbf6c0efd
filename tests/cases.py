"""A tiny model for each case of each method."""

from __future__ import annotations

import functools
from typing import Any

import torch

from gradmem import MemoryModel, methods
from gradmem.plugins import names

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
MAMBA = {
    "model_type": "mamba",
    "hidden_size": 16,
    "state_size": 4,
    "num_hidden_layers": 2,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}


GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_inner": 24, "n_layer": 2, "n_head": 2, "n_positions": 128} | {
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}


# Tiny backbone and options of each case of a method. One that is not here runs on LLAMA with its defaults.
CASES: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "armt": [(LLAMA, {"n_mem": 2, "d_mem": 8, "reconstruction": True}), (GPT2, {"d_mem": 8, "segment_length": 3})],
    "compact": [(LLAMA, {"budget": 0.6}), (GPT2, {"budget": 5, "shared": False, "writers": "select"})],
    "cram": [(LLAMA, {"n_mem": 3, "write_steps": 2}), (GPT2, {"n_mem": 1, "write_steps": 3, "start": "mean"})],
    "full_context": [(LLAMA, {}), (GPT2, {})],
    "gradmem": [
        (LLAMA, {"n_mem": 3, "write_steps": 2}),
        (GPT2, {"n_mem": 1, "n_ctrl": 1, "write_head": "random"}),
        (GPT2, {"n_mem": 2, "n_ctrl": 1, "projection": "per_sample", "chunk_size": 5, "chunk_mode": "independent"}),
        (LLAMA, {"n_mem": 2, "write_steps": 2, "chunk_size": 5}),
        (LLAMA, {"memory": "keys_values", "n_mem": 2, "projection": "proj", "chunk_size": 5, "chunk_mode": "growing"}),
        (
            GPT2,
            {"memory": "lora", "lora_rank": 2, "lora_placement": "target_modules", "write_steps": 2, "inner_lr": 0.01},
        ),
        (LLAMA, {"memory": "lora", "inner_lr": 0.1, "chunk_size": 5, "chunk_mode": "independent", "read_lora": 2}),
    ],
    "mamba": [(MAMBA, {})],
    "rmt": [
        (LLAMA, {"n_mem": 3, "write_steps": 2}),
        (GPT2, {"n_mem": 1, "n_ctrl": 1, "projection": "proj_rw"}),
        (LLAMA, {"n_mem": 2, "chunk_size": 5}),
        (GPT2, {"n_mem": 2, "chunk_size": 5, "chunk_mode": "independent"}),
    ],
    "vectors": [(LLAMA, {"n_mem": 3, "write_steps": 2}), (GPT2, {"n_mem": 1, "write_steps": 3})],
}


ALL = [(name, case) for name in names(methods.__name__) for case in range(len(CASES.get(name, [0])))]
TEXT = "a7:Qz\nk2:9f\nzz:aa"


@functools.cache
def build(name: str, case: int) -> MemoryModel:
    backbone, options = CASES.get(name, [(LLAMA, {})])[case]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MemoryModel.from_spec({"name": "kv", "pairs": 3}, backbone, {"name": name, **options})
        with torch.no_grad():
            # No parameter is zero or the identity.
            for parameter in model.method.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.method.eval()
    return model
