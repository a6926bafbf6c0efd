"""Tiny language models with a chat template, whose every byte is a token."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A template with a system turn of its own, as SmolLM2 has one."""
SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>"]


def save_tokenizer(folder: Path, template: str | None = CHATML) -> str:
    """Save a tokenizer of bytes; its end token is not the one that ends a turn."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[0], extra_special_tokens=SPECIAL[1:])
    made.chat_template = template
    made.save_pretrained(folder)
    return str(folder)


def save_model(folder: Path, template: str | None = CHATML, positions: int = 1024) -> str:
    """Save a language model with random weights, the same every time, and its tokenizer."""
    config = LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=positions, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return save_tokenizer(folder, template)
