"""Keys and values of memories in vLLM's cache, by the documented interface of connectors; no vLLM is run."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

import gradmem
from chat_models import save_model
from exports.vllm_standin import BASE, BLOCK, Engine, config, install
from gradmem import BoundMemory, GradmemError
from gradmem.exports.asking import prompt_ids
from gradmem.exports.targets import export

TEXT = "Clara signed the minutes in Velmouth. The code of the door is 4711."
NEW = 8


def written(folder: Path, budget: int, text: str = TEXT) -> BoundMemory:
    method = {"name": "compact", "budget": budget, "shared": False, "writers": "select"}
    memory: BoundMemory = gradmem.load(folder, method).write(text)
    return memory


@pytest.fixture
def memory(tmp_path: Path) -> BoundMemory:
    """A memory of two blocks, exported to a directory."""
    memory = written(Path(save_model(tmp_path / "model")), 2 * BLOCK)
    assert export(memory, "vllm", tmp_path / "memories" / "one.safetensors") == "32 positions"
    return memory


def connector(monkeypatch: pytest.MonkeyPatch, directory: Path | None, parallel: int = 1) -> Any:
    install(monkeypatch)
    module = importlib.import_module("gradmem.exports.vllm_connector")
    extra = {} if directory is None else {"memories": str(directory)}
    return module.MemoryConnector(config(extra, parallel), "both", None)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("computed", [0, BLOCK])
def test_the_cache_answers_the_same(
    memory: BoundMemory, computed: int, swapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy tokens of the plain model on what the connector loaded, and of READ; with blocks that vLLM had already."""
    ids = json.loads((tmp_path / "memories" / "one.safetensors.json").read_text())["memory"]
    prompt = prompt_ids(memory, ids, "Who?")
    engine = Engine(connector(monkeypatch, tmp_path / "memories"), (2, 1, 8), swapped)
    found, caches = engine.load(prompt, computed)
    assert found == 2 * BLOCK - computed
    for layer, own in zip(caches, memory.prefix.cache.layers, strict=True):
        for part, tensor in zip(layer, (own.keys, own.values), strict=True):
            assert torch.equal(part[:, :, computed:], tensor[:, :, computed:])
            assert bool(part[:, :, :computed].isnan().all()), "what vLLM had is not written again"
    if computed:
        return
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    query = prompt[len(ids) :]
    wanted = memory.model.method.generate(memory.prefix, [query], pad_id=memory.model.task.pad_id, **options)[0]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    made = plain.generate(torch.tensor([prompt]), past_key_values=DynamicCache(caches), **options)
    assert made[0, len(prompt) :].tolist() == wanted


def test_other_prompts_are_computed(memory: BoundMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt reads only the memory that it names; a new file is found; other files in the directory are no matter."""
    folder = tmp_path / "memories"
    loader = connector(monkeypatch, folder)
    engine = Engine(loader, (2, 1, 8))
    ids = json.loads((folder / "one.safetensors.json").read_text())["memory"]
    query = memory.model.encoder.query_ids("Who?")
    assert engine.load([*ids[:-1], ids[-1] + 1, *query])[0] == 0
    assert engine.load(ids)[0] == 0, "there is no question"
    other = written(tmp_path / "model", 2 * BLOCK, TEXT.replace("Clara", "Maria"))
    export(other, "vllm", folder / "two.safetensors")
    more = json.loads((folder / "two.safetensors.json").read_text())["memory"]
    assert more != ids
    memory.save(folder / "not-exported.safetensors")
    assert engine.load([*more, *query])[0] == 2 * BLOCK
    assert not loader.build_connector_meta(None).loads, "everything was handed over"


def test_what_cannot_be_loaded_says_why(memory: BoundMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GradmemError, match="the memory has 20: write it with --budget 16"):
        export(written(tmp_path / "model", 20), "vllm", tmp_path / "x")
    with pytest.raises(GradmemError, match='"memories": "DIR"'):
        connector(monkeypatch, None)
    with pytest.raises(GradmemError, match="without tensor parallelism"):
        connector(monkeypatch, tmp_path, parallel=2)
    loader = connector(monkeypatch, tmp_path / "memories")
    engine = Engine(loader, (2, 1, 4))
    ids = json.loads((tmp_path / "memories" / "one.safetensors.json").read_text())["memory"]
    with pytest.raises(GradmemError, match="lays its cache out in another way"):
        engine.load([*ids, 5])


def test_without_vllm_the_connector_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    monkeypatch.setitem(sys.modules, BASE, None)
    with pytest.raises(ImportError, match="pip install vllm"):
        importlib.import_module("gradmem.exports.vllm_connector")
