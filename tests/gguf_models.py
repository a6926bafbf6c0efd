"""Any small model of a few families, with its byte-level tokenizer, as a GGUF file in float32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from gguf_files import NAMES

NORMAL, CONTROL = 1, 3
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
MORE_NAMES = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", **NAMES}


def write_model(folder: Path, file: Path, pre: str = "default") -> Path:
    """Write the model and the tokenizer of a directory, as llama.cpp's converter does."""
    gguf = pytest.importorskip("gguf")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    writer = gguf.GGUFWriter(str(file), ARCHITECTURES[config.model_type])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _add_tokenizer(writer, folder, config.vocab_size, pre)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if ARCHITECTURES[config.model_type] == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            # llama.cpp turns neighbours, transformers turns halves.
            weight = weight.view(-1, 2, width // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        for ours, theirs in MORE_NAMES.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_tokenizer(writer: object, folder: Path, size: int, pre: str) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    special = tokenizer.added_tokens_decoder
    tokens = dict(sorted((place, token) for token, place in tokenizer.get_vocab().items()))
    names = [tokens.get(place, f"<unused{place}>") for place in range(size)]
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    writer.add_vocab_size(size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(names)
    writer.add_token_types([CONTROL if place in special or place not in tokens else NORMAL for place in range(size)])
    # A file needs at least one merge.
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in merges] or ["Ā Ā"])
    writer.add_bos_token_id(0 if tokenizer.bos_token_id is None else tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)
