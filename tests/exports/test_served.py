"""The language model of a checkpoint by itself: with its adapters of READ merged, it answers as READ does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gradmem
from chat_models import save_model
from gradmem import MemoryModel
from gradmem.cli.main import main
from gradmem.exports.prompt_embeds import prompt_embeds
from gradmem.exports.served import ORIGIN

TEXT, NEW = "Clara signed it.", 8


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """A checkpoint with adapters in both phases, none of them zero."""
    pytest.importorskip("peft")
    language_model = save_model(tmp_path / "language model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MemoryModel.from_spec(
            {"name": "raw_text", "tokenizer": language_model},
            {"pretrained": language_model},
            {"name": "gradmem", "n_mem": 2, "write_steps": 1, "read_lora": 2, "write_lora": 2},
        )
        for name, weight in model.method.named_parameters():
            if "lora_B" in name:
                weight.data.normal_(std=0.5)
    model.method.eval()
    model.save_pretrained(tmp_path / "checkpoint")
    return str(tmp_path / "checkpoint")


def test_the_merged_model_answers_the_same(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Transformers alone, from the directory and the exported embeddings."""
    served = tmp_path / "served"
    assert main(["merge", checkpoint, "-o", str(served)]) == 0
    assert capsys.readouterr().out.startswith(f"saved {served}")
    memory = gradmem.load(checkpoint).write(TEXT)
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    ids = memory.model.encoder.query_ids("Who?")
    wanted = memory.model.method.generate(memory.prefix, [ids], pad_id=memory.model.task.pad_id, **options)[0]
    embeds = prompt_embeds(memory, "Who?")[None]
    given = {"inputs_embeds": embeds, "attention_mask": torch.ones(embeds.shape[:2]).long(), **options}
    merged = AutoModelForCausalLM.from_pretrained(served).eval()
    assert merged.generate(**given)[0].tolist() == wanted
    base = gradmem.load(checkpoint).method.backbone.model
    assert base.generate(**given)[0].tolist() != wanted, "the adapters matter"
    assert not [name for name in merged.state_dict() if "lora" in name]
    assert AutoTokenizer.from_pretrained(served).encode("Who?", add_special_tokens=False) == ids
    again = gradmem.load(checkpoint).write(TEXT)
    assert torch.equal(again.tensors["memory"], memory.tensors["memory"]), "the checkpoint is as it was"


def test_a_checkpoint_is_exported_for_its_own_model(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command refuses to export for a server that runs something else, and says what to do."""
    file = str(gradmem.load(checkpoint).write(TEXT).save(tmp_path / "m.safetensors"))
    served, other = tmp_path / "served", tmp_path / "other"
    assert main(["merge", checkpoint, "-o", str(served)]) == 0
    command = ["export", file, "--to", "vllm", "--checkpoint", checkpoint, "-o", str(tmp_path / "m.pt")]

    def refusal(*more: str) -> str:
        capsys.readouterr()
        assert main([*command, *more]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert not (tmp_path / "m.pt").exists()
        return line

    assert f"and LoRA adapters in READ: merge it first (gradmem merge {checkpoint} -o DIR)" in refusal()
    assert "other" in refusal("--served", str(other))
    other.mkdir()
    (other / ORIGIN).write_text('{"backbone": "0"}')
    assert "holds another model" in refusal("--served", str(other))
    assert main([*command, "--served", str(served)]) == 0
    assert main(["merge", checkpoint, "-o", str(served)]) == 2
    assert "give a new directory" in capsys.readouterr().err


def test_small_models_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No server loads the model of a packaged checkpoint."""
    file = str(gradmem.load("kv-16").write("a7:Qz").save(tmp_path / "m.safetensors"))
    assert main(["export", file, "--to", "llama.cpp", "-o", str(tmp_path / "m.bin")]) == 2
    assert "'kv-16' is a small model with a vocabulary of its own" in capsys.readouterr().err


def test_a_plain_model_is_saved_as_it_is(tmp_path: Path) -> None:
    """So that a server can run what came as a GGUF file; memories are written with either."""
    folder = save_model(tmp_path / "model")
    assert main(["merge", folder, "-o", str(tmp_path / "copy")]) == 0
    memory = gradmem.load(folder, {"name": "full_context"}).write(TEXT)
    copied = gradmem.load(tmp_path / "copy", {"name": "full_context"}).bind(memory)
    assert copied.ask("Who?") == memory.ask("Who?")
