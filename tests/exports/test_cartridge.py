"""Memories of keys and values as adapters of PEFT, against peft itself and against reading the same cache."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache

import gradmem
from chat_models import save_model
from families import tiny_model
from gradmem import GradmemError, Memory
from gradmem.cli.main import main
from gradmem.exports.cartridge import load_cartridge, save_cartridge
from gradmem.exports.targets import export

ENTRIES, QUERY, NEW = 5, [7, 8, 9, 25], 6


def with_cartridges() -> Any:
    """The package peft, if it is one that has CARTRIDGE."""
    peft = pytest.importorskip("peft")
    if not hasattr(peft, "CartridgeConfig"):
        pytest.skip(f"peft {peft.__version__} has no CARTRIDGE")
    return peft


def compact(model: PreTrainedModel, counts: Tensor | None = None) -> tuple[Memory, list[tuple[Tensor, Tensor]]]:
    """A memory as a method would write it, and its keys and values by layer: (1, heads, entries, width)."""
    ids = torch.tensor([[5, 9, 11, 7, 30]])
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    generator = torch.Generator().manual_seed(0)
    layers = [
        tuple(part + torch.randn(part.shape, generator=generator) for part in (layer.keys, layer.values))
        for layer in cache.layers
    ]
    keys, values = (torch.cat([layer[part][0].flatten(0, 1) for layer in layers])[None] for part in (0, 1))
    heads = layers[0][0].shape[1]
    counts = torch.full((1, len(layers), heads), ENTRIES) if counts is None else counts
    tensors = {"keys": keys, "values": values, "counts": counts, "before": torch.zeros_like(counts)}
    tensors["start"] = torch.tensor([ENTRIES])
    return Memory({**tensors, "lengths": torch.tensor([keys.shape[1]])}), layers


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "qwen3"])
def test_peft_answers_the_same(kind: str, tmp_path: Path) -> None:
    """Logits, and tokens that are generated greedily."""
    peft = with_cartridges()
    model = tiny_model(kind, **({"sliding_window": 64} if kind == "gemma2" else {}))
    memory, layers = compact(model)
    assert save_cartridge(memory, tmp_path) == ENTRIES
    ids, answer = list(QUERY), list[int]()
    for _ in range(NEW):
        logits = model(torch.tensor([ids]), past_key_values=DynamicCache(layers), use_cache=True).logits[0]
        answer.append(int(logits[-1].argmax()))
        ids.append(answer[-1])
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    found = adapted(input_ids=torch.tensor([ids[:-1]])).logits[0]
    assert torch.allclose(found, logits, atol=1e-5 * float(logits.abs().max()))
    assert not torch.allclose(found, model(torch.tensor([ids[:-1]])).logits[0], atol=0.01), "the memory matters"
    given = {"attention_mask": torch.ones(1, len(QUERY), dtype=torch.long), "max_new_tokens": NEW, "do_sample": False}
    made = adapted.generate(input_ids=torch.tensor([QUERY]), pad_token_id=0, **given)
    assert made[0, -NEW:].tolist() == answer


def test_a_cartridge_comes_back(tmp_path: Path) -> None:
    memory, _ = compact(tiny_model("llama"))
    save_cartridge(memory, tmp_path)
    back = load_cartridge(tmp_path)
    assert back.tensors.keys() == memory.tensors.keys()
    for name, tensor in memory.tensors.items():
        assert torch.equal(back.tensors[name], tensor), name


@torch.no_grad()
def test_what_peft_saves_is_read(tmp_path: Path) -> None:
    """An adapter that peft itself made from the cache of a text."""
    peft = with_cartridges()
    model, ids = tiny_model("llama"), torch.tensor([[5, 9, 11, 7, 30]])
    cache = model(ids, use_cache=True).past_key_values
    adapted = peft.get_peft_model(model, peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    legacy = [(layer.keys, layer.values) for layer in cache.layers]
    peft.initialize_kv_prefix_from_past_key_values(adapted, past_key_values=legacy)
    adapted.save_pretrained(tmp_path)
    found = load_cartridge(tmp_path)
    heads, width = legacy[0][0].shape[1], legacy[0][0].shape[3]
    for name, part in (("keys", 0), ("values", 1)):
        wanted = torch.cat([layer[part] for layer in legacy])
        assert torch.equal(found.tensors[name].view(len(legacy), heads, 5, width), wanted)


@torch.no_grad()
def test_vectors_are_exported_as_what_the_model_makes_of_them(tmp_path: Path) -> None:
    """A memory of vectors, run through the model: peft predicts what READ predicts."""
    peft = with_cartridges()
    folder = save_model(tmp_path / "model")
    memory = gradmem.load(folder, {"name": "gradmem", "n_mem": 3, "write_steps": 1, "n_ctrl": 1}).write("Clara signed.")
    assert export(memory, "cartridge", tmp_path / "adapter") == "5 positions"
    query = torch.tensor([memory.model.encoder.query_ids("Who?")])
    wanted = memory.model.method.backbone.model(query, past_key_values=memory.prefix.select(torch.tensor([0])).cache)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    assert torch.allclose(adapted(input_ids=query).logits, wanted.logits, atol=1e-4)


def changed(memory: Memory, **tensors: Tensor) -> Memory:
    return Memory({**memory.tensors, **tensors})


def test_what_cannot_be_exported_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command, with one line that says what to do; nothing is saved."""
    monkeypatch.chdir(tmp_path)
    memory, _ = compact(tiny_model("llama"))
    ragged = memory.tensors["counts"].clone()
    ragged[0, 0, 0], ragged[0, 0, 1] = 4, 6
    cases: list[tuple[Memory, str]] = [
        (Memory({"memory": torch.zeros(1, 2, 8)}), "does not say which model wrote it"),
        (Memory.join([memory, memory]), "has 2 chunks"),
        (changed(memory, counts=ragged), "write it with --shared false"),
        (changed(memory, start=torch.tensor([40])), "write it with --shared false --positions memory"),
        (changed(memory, values=torch.zeros(1, memory.tensors["keys"].shape[1], 4)), "different widths"),
    ]
    for number, (one, what) in enumerate(cases):
        one.save(f"{number}.safetensors")
        assert main(["export", f"{number}.safetensors", "--to", "cartridge", "-o", "adapter"]) == 2
        assert what in capsys.readouterr().err
        assert not Path("adapter").exists()
    assert main(["export", "absent", "-o", "adapter"]) == 2
    memory.save("good.safetensors")
    capsys.readouterr()
    assert main(["export", "good.safetensors", "--to", "cartridge", "-o", "adapter"]) == 0
    assert capsys.readouterr().out.startswith("saved adapter: 5 positions")


@pytest.mark.parametrize(
    "change",
    [
        {"peft_type": "LORA"},
        {"num_virtual_tokens": 4},
        {"num_layers": -2, "token_dim": -16},
        {"num_attention_heads": 0},
        {"num_layers": None},
    ],
)
def test_damaged_adapters_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    memory, _ = compact(tiny_model("llama"))
    save_cartridge(memory, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(GradmemError, match="holds no adapter of type CARTRIDGE") as raised:
        load_cartridge(tmp_path)
    assert "\n" not in str(raised.value)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(GradmemError, match="holds no adapter of type CARTRIDGE"):
        load_cartridge(tmp_path)
