"""Weights that are not all there, and checkpoints of another format: one line each, and no weight is made up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gradmem
from gradmem import GradmemError
from gradmem.model.checkpoint import FORMAT
from gradmem.tasks.text import byte_tokenizer
from gradmem.training.recipe import Recipe, Stage
from gradmem.training.trainer import Trainer
from model_files import CONFIG, INDEX, METHOD, WEIGHTS, edit, refusal, retensor


def test_missing_weights_are_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    retensor(place / "lm" / WEIGHTS, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".1." in name])
    assert "lack model.layers.1.input_layernorm.weight, model.layers.1.mlp.down_proj.weight" in refusal(
        place / "lm", capsys
    )


def test_a_head_that_should_not_be_tied_is_missed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    retensor(place / "lm" / WEIGHTS, lambda tensors: tensors.pop("lm_head.weight"))
    assert "lack lm_head.weight" in refusal(place / "lm", capsys)
    edit(place / "lm" / CONFIG, lambda fields: fields.update(tie_word_embeddings=True))
    assert gradmem.load(place / "lm", METHOD).write("abc")


def test_shards(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, shards = place / "lm", place / "shards"
    plain, parts = (gradmem.load(one, METHOD).fingerprints for one in (whole, shards))
    assert plain == parts
    last = sorted(shards.glob("model-*.safetensors"))[-1]
    last.rename(place / last.name)
    assert f"no file {last.name}" in refusal(shards, capsys)
    (place / last.name).rename(last)
    index = json.loads((shards / INDEX).read_text())["weight_map"]
    gone = [name for name, file in index.items() if file == last.name]
    edit(shards / INDEX, lambda fields: [fields["weight_map"].pop(name) for name in gone])
    assert min(gone) in refusal(shards, capsys)


@pytest.mark.parametrize("name", ["../lm/model.safetensors", "/etc/passwd", "weights.bin", 5])
def test_an_index_names_files_beside_it(place: Path, name: Any, capsys: pytest.CaptureFixture[str]) -> None:
    edit(place / "shards" / INDEX, lambda fields: fields["weight_map"].update({"lm_head.weight": name}))
    assert "must name safetensors files beside it" in refusal(place / "shards", capsys)


@pytest.mark.parametrize(
    "change", [{"intermediate_size": 24}, {"vocab_size": 260}, {"num_key_value_heads": 1}], ids=str
)
def test_weights_of_other_shapes_are_named(
    place: Path, change: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    edit(place / "lm" / CONFIG, lambda fields: fields.update(change))
    assert "does not fit its config: " in refusal(place / "lm", capsys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("initial_memory"), "lacks initial_memory"),
        (lambda tensors: tensors.pop("backbone.model.model.norm.weight"), "lacks backbone.model.model.norm.weight"),
        (lambda tensors: tensors.update(other=torch.zeros(2)), "of another model: it has other"),
        (lambda tensors: tensors.update(initial_memory=torch.zeros(8, 1)), r"initial_memory is (8, 1) and should be"),
    ],
)
def test_weights_of_a_checkpoint_are_all_there(
    place: Path, change: Callable[[Any], Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    retensor(place / "checkpoint" / WEIGHTS, change)
    assert message in refusal(place / "checkpoint", capsys)


def test_a_gguf_file_with_missing_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    from gguf_files import write_gguf

    monkeypatch.setenv("GRADMEM_CACHE", str(tmp_path / "cache"))
    file = write_gguf(tmp_path / "part.gguf", lambda name: "blk.1.attn_q" not in name)
    with pytest.raises(GradmemError, match=r"part.gguf is not complete: its weights lack model.layers.1.self_attn.q"):
        gradmem.load(file, METHOD)
    file = write_gguf(tmp_path / "deep.gguf", blocks=2**31)
    with pytest.raises(GradmemError, match="block_count is 2147483648"):
        gradmem.load(file, METHOD)
    assert list((tmp_path / "cache").iterdir()) == []


def test_text_has_no_token_without_weights(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Special tokens stand in no text; any other must have an embedding."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[MORE]"})
    tokenizer.save_pretrained(place / "lm")
    assert gradmem.load(place / "lm", METHOD).write("abc")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["abc"])
    tokenizer.save_pretrained(place / "lm")
    assert "knows 259 tokens and the task's tokenizer has 260" in refusal(place / "lm", capsys)


def test_a_warm_start_takes_something_over(made: Path, tmp_path: Path) -> None:
    backbone = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 64}
    recipe = Recipe(
        {"name": "kv", "pairs": 2}, backbone, {"name": "gradmem", "n_mem": 1}, [Stage(1)], str(made / "checkpoint")
    )
    with pytest.raises(GradmemError, match="none of its weights has the name and shape"):
        Trainer(recipe, tmp_path / "run")


@pytest.mark.parametrize("number", [FORMAT - 1, None, FORMAT + 1, str(FORMAT)])
def test_checkpoints_of_another_format_are_refused(
    place: Path, number: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(place / "checkpoint" / CONFIG, lambda fields: fields.update(format=number))
    said = refusal(place / "checkpoint", capsys)
    assert f"has checkpoint format {number!r}, this gradmem reads {FORMAT}" in said
    assert ("train it again, or edit its config.json" in said) == (number == 1)
