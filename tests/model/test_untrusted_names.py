"""Model and memory files name nothing that is run or fetched."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM

import gradmem
from gradmem import GradmemError, Memory, MemoryModel
from gradmem.cli.main import main
from helpers import tiny_model
from model_files import CONFIG, METHOD, TEXT, WEIGHTS, edit, refusal

CODE = """
import pathlib
pathlib.Path({marker!r}).write_text("ran")
from transformers import LlamaConfig as Config, LlamaForCausalLM as Model, PreTrainedTokenizerFast as Tokenizer
"""


@pytest.fixture
def marker(place: Path) -> Path:
    """A file that the code in `place/lm`, which its files name, would make; with a memory that names the directory."""
    marker = place / "ran"
    (place / "lm" / "evil.py").write_text(CODE.format(marker=str(marker)))
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    gradmem.load(place / "lm", METHOD).write("abc").save(place / "m")
    edit(place / "lm" / CONFIG, lambda fields: fields.update(auto_map=names))
    (place / "lm" / "generation_config.json").write_text(json.dumps({"custom_generate": "evil"}))
    edit(
        place / "lm" / "tokenizer_config.json",
        lambda fields: fields.update(auto_map={"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}),
    )
    return marker


def test_a_memory_file_runs_no_code(
    place: Path, marker: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where whoever asks types `y`, as if transformers had asked: those are queries."""
    monkeypatch.setattr("gradmem.model.loading.NAMED", set())
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\ny\n"))
    capsys.readouterr()
    assert main(["ask", str(place / "m")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.strip().splitlines()
    assert f"--checkpoint {place / 'lm'}" in line
    assert main(["ask", str(place / "m"), "--checkpoint", str(place / "lm")]) == 0
    assert [json.loads(line)["query"] for line in capsys.readouterr().out.splitlines()] == ["y", "y", "y"]
    assert not marker.exists()


@pytest.mark.parametrize("missing", [CONFIG, "tokenizer.json"])
def test_code_is_not_offered_where_nothing_else_would_do(
    place: Path, marker: Path, missing: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    if missing == CONFIG:
        edit(place / "lm" / CONFIG, lambda fields: fields.update(model_type="evil"))
    else:
        (place / "lm" / missing).unlink()
    refusal(place / "lm", capsys)
    assert not marker.exists()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Requests, of which none is answered."""
    asked: list[str] = []

    def request(*given: Any, **options: Any) -> None:
        asked.append(str(given))
        raise OSError("no network in this test")

    monkeypatch.setattr("socket.getaddrinfo", request)
    monkeypatch.setattr("socket.socket.connect", request)
    return asked


def named(memory: Memory, model: str, folder: Path, **options: Any) -> Path:
    """A memory file that says another model wrote it."""
    from dataclasses import replace

    receipt = replace(memory.receipts[0], model=model, options=options)
    return Memory(memory.tensors, [receipt]).save(folder / "named")


@pytest.mark.parametrize("name", ["someone/model", "gpt2", "/etc", "../made/lm", "x.gguf"])
def test_a_memory_file_does_not_say_what_is_loaded(
    tiny: MemoryModel, tmp_path: Path, name: str, offline: list[str]
) -> None:
    file = named(tiny.write(TEXT), name, tmp_path)
    with pytest.raises(GradmemError, match="a file does not decide what is loaded"):
        gradmem.open(file)
    assert offline == []
    with pytest.raises(GradmemError, match="only through the model that wrote it"):
        gradmem.open(file, "kv-32")


def test_a_name_is_asked_for_where_the_user_gives_it(
    tiny: MemoryModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(name: str, *given: Any, **options: Any) -> None:
        asked.append(name)
        raise OSError("no network in this test")

    monkeypatch.setattr("gradmem.model.loading.hf_hub_download", download)
    monkeypatch.setattr("gradmem.model.checkpoint.snapshot_download", download)
    file = named(tiny.write(TEXT), "someone/model", tmp_path)
    with pytest.raises(GradmemError, match="no network in this test"):
        gradmem.open(file, "someone/other")
    assert set(asked) == {"someone/other"}


def test_options_of_a_memory_file_take_no_memory(made: Path, tmp_path: Path) -> None:
    memory = gradmem.load(made / "lm", METHOD).write("abc")
    with pytest.raises(GradmemError, match="n_mem is 1000000000, and the file holds nothing of that size"):
        gradmem.open(named(memory, str(made / "lm"), tmp_path, n_mem=10**9))


@pytest.mark.parametrize("name", ["someone/model", "gpt2"])
def test_a_checkpoint_names_no_other_model(
    place: Path, name: str, offline: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    edit(place / "checkpoint" / CONFIG, lambda fields: fields.update(backbone={"pretrained": name}))
    assert "names a pretrained model" in refusal(place / "checkpoint", capsys)
    assert offline == []


def test_a_checkpoint_names_no_data_and_no_tokenizer(place: Path, offline: list[str]) -> None:
    task = {"name": "text", "tokenizer": "", "data": "someone/data"}
    edit(place / "checkpoint" / CONFIG, lambda fields: fields.update(task=task))
    model = gradmem.load(place / "checkpoint")
    assert model.task.tokenizer.get_vocab() == tiny_model(0).task.tokenizer.get_vocab()
    assert model.spec["task"] == {"name": "text", "tokenizer": str(place / "checkpoint")}
    assert offline == []


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_kernels_of_the_hub_are_not_named_by_files(place: Path, field: str, offline: list[str]) -> None:
    kernel = {field: "someone/kernel"}
    edit(place / "lm" / CONFIG, lambda fields: fields.update(kernel))
    edit(place / "checkpoint" / CONFIG, lambda fields: fields["backbone"].update(kernel))
    for one, text, method in (("lm", "abc", METHOD), ("checkpoint", TEXT, None)):
        assert gradmem.load(place / one, method).write(text, 1)
    assert offline == []


def test_adapters_are_refused(place: Path, offline: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """They name another model, and their scale is not in their weights."""
    about = {"base_model_name_or_path": "someone/model", "peft_type": "LORA"}
    (place / "lm" / "adapter_config.json").write_text(json.dumps(about))
    assert "merge_and_unload" in refusal(place / "lm", capsys)
    (place / "lm" / CONFIG).unlink()
    refusal(place / "lm", capsys)
    assert offline == []


def test_a_hub_name_brings_files_and_no_code(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def snapshot(name: str, **options: Any) -> str:
        asked.append(options)
        return str(made / "lm")

    monkeypatch.setattr("gradmem.pretrained.snapshot_download", snapshot)
    monkeypatch.setattr("gradmem.model.loading.hf_hub_download", lambda name, file: str(made / "lm" / file))
    assert gradmem.load("someone/model", METHOD).fingerprints == gradmem.load(made / "lm", METHOD).fingerprints
    names = [*(file.name for file in (made / "shards").iterdir()), "evil.py", "pytorch_model.bin", "x/config.json"]
    for options in asked:
        kept = set(huggingface_hub.utils.filter_repo_objects(names, **options))
        assert kept == {file.name for file in (made / "shards").iterdir()} - {"README.md", "generation_config.json"}


@pytest.mark.parametrize("suffix", ["pytorch_model.bin", "model.pt"])
def test_weights_that_may_run_code_are_refused(place: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(place / "lm")
    (place / "lm" / WEIGHTS).unlink()
    torch.save(model.state_dict(), place / "lm" / suffix)
    assert "safetensors only; convert others" in refusal(place / "lm", capsys)
