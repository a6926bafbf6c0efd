"""Pretrained tokenizers and the padding token that they may lack."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gradmem import GradmemError, MemoryModel
from gradmem.pretrained import pretrained_tokenizer
from helpers import DATA, TINY_GRADMEM, TINY_LLAMA, needs


@needs("gpt2_tokenizer")
def test_gpt2_pads_with_a_token_of_its_own() -> None:
    tokenizer = pretrained_tokenizer(str(DATA / "gpt2_tokenizer"))
    assert (len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id) == (50258, 50257, 50256)
    assert tokenizer.unk_token_id is None
    assert tokenizer("Hello there", add_special_tokens=False).input_ids == [15496, 612]


@needs("stories260K_hf")
def test_a_pretrained_backbone_grows_by_the_pad() -> None:
    place = str(DATA / "stories260K_hf")
    model = MemoryModel.from_spec({"name": "text", "tokenizer": place}, {"pretrained": place}, TINY_GRADMEM)
    assert model.task.pad_id == 512
    assert model.method.backbone.head.weight.shape[0] == 513
    assert model.write("Once upon a time").receipts[0].context_tokens == len(model.task.encode("Once upon a time"))


def test_pretrained_models_answer_as_before_but_for_the_pad(bytes_tokenizer: str, tmp_path: Path) -> None:
    fields = {**TINY_LLAMA, "vocab_size": 257, "tie_word_embeddings": True}
    fields.pop("model_type")
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    theirs.save_pretrained(tmp_path / "llama")
    task = {"name": "text", "tokenizer": bytes_tokenizer}
    ours = MemoryModel.from_spec(
        task, {"pretrained": str(tmp_path / "llama")}, TINY_GRADMEM
    ).method.backbone.model.eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.allclose(ours(ids).logits[..., :257], theirs(ids).logits, atol=1e-5)


def test_unknown_tokenizer_is_named() -> None:
    with pytest.raises(GradmemError, match="cannot load the tokenizer '/no/such/place'"):
        pretrained_tokenizer("/no/such/place")
