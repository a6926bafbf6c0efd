"""Shapes of the models that are measured, as fields of their configs."""

from __future__ import annotations

from typing import Any

PAPER_BACKBONE = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    # 1/sqrt(d): with 0.02 the memory would hardly matter, and any two losses would agree.
    "initializer_range": 0.08,
}

SMOLLM2: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
}
"""The shape of SmolLM2-135M, with random weights: neither time nor memory depends on their values."""
