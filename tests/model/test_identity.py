"""Two models are the same if, and only if, they compute the same: weights, config, tokenizer and options."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import gradmem
from gradmem import GradmemError
from gradmem.store import Store
from gradmem.tasks.text import byte_tokenizer
from helpers import tiny_model

METHOD = {"name": "cram", "n_mem": 2, "write_steps": 1}
SIZES = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
Places = Callable[[str], Path]


@pytest.fixture(scope="module")
def place_of(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """A directory with a random language model of a kind, made once."""
    made: dict[str, Path] = {}

    def place(kind: str) -> Path:
        if kind not in made:
            folder = made[kind] = tmp_path_factory.mktemp(kind)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES)).save_pretrained(folder)
            byte_tokenizer().save_pretrained(folder)
        return made[kind]

    return place


def fingerprint(place: Path, method: dict[str, Any] | None = None) -> str:
    return gradmem.load(place, METHOD | (method or {})).fingerprints["checkpoint"]


def edited(place: Path, folder: Path, change: Callable[[Any], Any], name: str = "config.json") -> Path:
    """A copy whose config, or another JSON file, was changed in place or is what `change` returns."""
    shutil.copytree(place, folder)
    fields = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(change(fields) or fields))
    return folder


ROPE = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("llama", {"rope_parameters": ROPE | {"rope_theta": 500000.0}}),
        ("llama", {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 2.0}}),
        ("llama", {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 3.0}}),
        ("llama", {"hidden_act": "relu"}),
        ("llama", {"rms_norm_eps": 0.1}),
        ("llama", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}),
        ("mistral", {"sliding_window": 3}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0}),
        ("phi3", {"partial_rotary_factor": 0.5}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ],
    ids=str,
)
def test_a_config_that_computes_something_else_is_another_model(
    place_of: Places, tmp_path: Path, kind: str, change: dict[str, Any]
) -> None:
    model = gradmem.load(place_of(kind), METHOD)
    place = edited(place_of(kind), tmp_path / "other", lambda fields: fields.update(change))
    other = gradmem.load(place, METHOD)
    assert torch.equal(model.method.backbone.head.weight, other.method.backbone.head.weight)
    file = model.write("abc").save(tmp_path / "m")
    with pytest.raises(GradmemError, match="only through the model that wrote it") as refused:
        gradmem.open(file, place)
    for one in (model, other):
        assert one.fingerprints["checkpoint"][:16] in str(refused.value)
    assert model.fingerprints["backbone"] != other.fingerprints["backbone"]
    with Store(tmp_path / "store.db") as store:
        assert store.write(model, "abc").id != store.write(other, "abc").id


def test_what_only_describes_a_model_changes_nothing(place_of: Places, tmp_path: Path) -> None:
    """Notes, defaults, types as they are written, the older names of fields, and their order."""
    place = place_of("llama")
    wanted = fingerprint(place)

    def rewrite(fields: dict[str, Any]) -> dict[str, Any]:
        fields.pop("rope_parameters")
        fields.pop("dtype")
        fields.pop("attention_bias")  # a default
        fields |= {
            "transformers_version": "4.1.0", "_name_or_path": "/elsewhere", "architectures": ["Other"],
            "use_cache": False, "torch_dtype": "float16", "torchscript": False, "pruned_heads": {}, "top_k": 50,
            "rope_theta": 10000, "pretraining_tp": 1, "attention_dropout": 0.5, "initializer_range": 0.3,
            "auto_map": {"AutoModelForCausalLM": "other.Model"}, "attn_implementation": "eager", "num_labels": 3,
        }  # fmt: skip
        return dict(reversed(fields.items()))

    assert fingerprint(edited(place, tmp_path / "described", rewrite)) == wanted
    AutoModelForCausalLM.from_pretrained(place).save_pretrained(tmp_path / "again")
    byte_tokenizer().save_pretrained(tmp_path / "again")
    assert fingerprint(tmp_path / "again") == wanted
    older = {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}
    newer = {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 2}}
    names = [
        fingerprint(edited(place, tmp_path / f"rope{number}", lambda fields, change=change: fields.update(change)))
        for number, change in enumerate((older, newer))
    ]
    assert names[0] == names[1] != wanted


def test_options_count_by_their_value(place_of: Places) -> None:
    place = place_of("llama")
    assert gradmem.load(place, {"name": "cram"}).fingerprints == (
        gradmem.load(place, {"name": "cram", "n_mem": 16, "inner_lr": 1}).fingerprints
    )
    assert fingerprint(place) != fingerprint(place, {"inner_lr": 0.5})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokenizer_config.json", {"eos_token": "a"}),
        ("tokenizer_config.json", {"clean_up_tokenization_spaces": True}),
        ("tokenizer.json", {"normalizer": {"type": "Lowercase"}}),
    ],
    ids=str,
)
def test_another_tokenizer_is_another_model(
    place_of: Places, tmp_path: Path, name: str, change: dict[str, Any]
) -> None:
    place = edited(place_of("llama"), tmp_path / "other", lambda fields: fields.update(change), name)
    assert fingerprint(place) != fingerprint(place_of("llama"))


def test_a_tokenizer_that_padded_is_the_same(place_of: Places) -> None:
    model = gradmem.load(place_of("llama"), METHOD)
    model.task.tokenizer(["abc", "a"], padding=True, truncation=True, max_length=2)
    assert model.fingerprints["checkpoint"] == fingerprint(place_of("llama"))


@pytest.mark.parametrize(
    "change", [{"backbone": {"hidden_act": "relu"}}, {"method": {"inner_lr": 0.5}}, {"task": {"pairs": 4}}], ids=str
)
def test_settings_of_a_checkpoint_are_part_of_it(tmp_path: Path, change: dict[str, Any]) -> None:
    model = tiny_model(0)
    model.save_pretrained(tmp_path / "one")
    assert gradmem.load(tmp_path / "one").fingerprints == model.fingerprints

    def change_part(fields: dict[str, Any]) -> None:
        ((part, options),) = change.items()
        fields[part] |= options

    other = edited(tmp_path / "one", tmp_path / "other", change_part)
    file = model.write("a7:Qz").save(tmp_path / "m")
    with pytest.raises(GradmemError, match="only through the model that wrote it"):
        gradmem.open(file, other)


def test_packaged_checkpoints_abstain_by_their_own_numbers() -> None:
    """Loading refuses an abstain.safetensors of any other model."""
    assert gradmem.load("kv-32").abstain is not None
    assert gradmem.load("kv-16").abstain is not None
    assert gradmem.load("babi").abstain is not None
