"""Memories of vectors as prompt embeddings: against transformers, and against what vLLM and SGLang accept."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import gradmem
from chat_models import save_model
from exports.vllm_standin import Refused, received
from gradmem import GradmemError
from gradmem.cli.main import main
from gradmem.exports.prompt_embeds import has_vectors, memory_embeds, prompt_embeds, to_base64
from gradmem.exports.targets import export

TEXT = "Clara signed the minutes in Velmouth."
VECTORS = {"name": "gradmem", "n_mem": 3, "write_steps": 1, "n_ctrl": 1}
NEW = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    "method",
    [
        {"name": "cram", "n_mem": 2, "write_steps": 1},
        VECTORS | {"projection": "per_sample"},
        {"name": "rmt", "n_mem": 2, "n_ctrl": 1, "projection": "proj_rw"},
        {"name": "vectors", "n_mem": 2, "write_steps": 1},
        VECTORS | {"chunk_size": 16, "chunk_mode": "independent"},
    ],
    ids=["cram", "gradmem", "rmt", "vectors", "chunks"],
)
def test_transformers_answers_the_same(folder: str, method: dict[str, Any]) -> None:
    """Greedy tokens of the plain model on the whole prompt's embeddings, and of READ; through a request of vLLM too."""
    memory = gradmem.load(folder, method).write(TEXT)
    ids = memory.model.encoder.query_ids("Who?")
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    wanted = memory.model.method.generate(memory.prefix, [ids], pad_id=memory.model.task.pad_id, **options)[0]
    embeds = prompt_embeds(memory, "Who?")
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    sent = received(to_base64(embeds), plain.config.hidden_size, torch.float32)
    assert torch.equal(sent, embeds)
    assert sent.is_contiguous()
    found = plain.generate(inputs_embeds=sent[None], attention_mask=torch.ones(1, len(sent)).long(), **options)
    assert found[0].tolist() == wanted
    without = plain.generate(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long(), **options)
    assert without[0, len(ids) :].tolist() != wanted, "the memory matters"


def test_slots_of_gradmem_are_exported_as_keys_and_values(folder: str, tmp_path: Path) -> None:
    """Memories of gradmem that are no vectors: vLLM gets the keys and values that READ puts before a query."""
    method = {"name": "gradmem", "memory": "keys_values", "n_mem": 15, "write_steps": 1}
    memory = gradmem.load(folder, method).write(TEXT)
    assert not has_vectors(memory.model.method)
    assert export(memory, "vllm", tmp_path / "memory.safetensors") == "16 positions"  # and the vector before a text
    saved = load_file(tmp_path / "memory.safetensors")
    for layer, kept in enumerate(memory.prefix.cache.layers):
        assert torch.equal(saved["keys"][layer].transpose(0, 1), kept.keys[0])
        assert torch.equal(saved["values"][layer].transpose(0, 1), kept.values[0])


def test_a_request_carries_only_its_own_numbers(folder: str) -> None:
    """Not the storage that a part of a tensor shares with the rest."""
    memory = gradmem.load(folder, VECTORS).write(TEXT)
    part = prompt_embeds(memory, "Who?" * 20)[:2]
    assert len(to_base64(part)) < 3000
    assert torch.equal(received(to_base64(part), 16, torch.float32), part)


def sent(value: Any) -> str:
    file = io.BytesIO()
    torch.save(value, file)
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ("!", "cannot be loaded"),
        (base64.b64encode(b"cos\nsystem\n").decode(), "cannot be loaded"),
        (sent([1.0]), "is no tensor"),
        (sent(torch.eye(16).to_sparse()), "is sparse"),
        (sent(torch.zeros(16)), "has 1 dimensions"),
        (sent(torch.zeros(2, 8)), "has width 8"),
        (sent(torch.zeros(2, 16, dtype=torch.long)), "has type torch.int64"),
    ],
)
def test_the_stand_in_refuses_what_vllm_refuses(data: str, why: str) -> None:
    with pytest.raises(Refused, match=why):
        received(data, 16, torch.bfloat16)
    assert received(sent(torch.ones(1, 3, 16)), 16, torch.bfloat16).shape == (3, 16)


def test_files_for_vllm_and_sglang(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command: a tensor that loads without code, and lists of numbers, of which a client makes whole prompts."""
    memory = gradmem.load(folder, VECTORS).write(TEXT)
    file, wanted = memory.save(tmp_path / "m.safetensors"), memory_embeds(memory)
    for to, name in (("vllm", "m.pt"), ("sglang", "m.json")):
        capsys.readouterr()
        assert main(["export", str(file), "--to", to, "--checkpoint", folder, "-o", str(tmp_path / name)]) == 0
        assert capsys.readouterr().out == f"saved {tmp_path / name}: 5 embeddings\n"
    assert torch.equal(torch.load(tmp_path / "m.pt", weights_only=True), wanted)
    assert torch.tensor(json.loads((tmp_path / "m.json").read_text())).allclose(wanted)
    assert torch.equal(prompt_embeds(memory, "Who?")[:5], wanted)


def test_what_is_no_prompt_is_refused(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = gradmem.load(folder, VECTORS)
    both = model.write([TEXT, TEXT + " So."])
    with pytest.raises(GradmemError, match="has 2 rows"):
        memory_embeds(both)
    broken = model.write(TEXT)
    broken.tensors["memory"][0, 0, 0] = torch.inf
    with pytest.raises(GradmemError, match="not finite"):
        memory_embeds(broken)
    compact = gradmem.load(folder, {"name": "compact", "budget": 16, "shared": False, "writers": "select"}).write(TEXT)
    file = compact.save(tmp_path / "m.safetensors")
    capsys.readouterr()
    assert main(["export", str(file), "--to", "sglang", "--checkpoint", folder, "-o", str(tmp_path / "x")]) == 2
    assert "SGLang takes no keys and values" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
