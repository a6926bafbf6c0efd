"""Model files that are incomplete, lie, or name what they should not: one line each, and nothing runs or is made up."""

from __future__ import annotations

import dataclasses
import io
import json
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import gradmem
from gradmem import GradmemError, Memory, MemoryModel
from gradmem.cli.main import main
from gradmem.tasks.text import byte_tokenizer
from gradmem.training.recipe import Recipe, Stage
from gradmem.training.trainer import Trainer
from helpers import tiny_model

METHOD = {"n_mem": 2, "write_steps": 1}
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TEXT = "a7:Qz\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a language model, the same in several files, and a checkpoint."""
    folder = tmp_path_factory.mktemp("made")
    config = LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "lm")
    model.save_pretrained(folder / "shards", max_shard_size="20KB")
    assert len(list((folder / "shards").glob("model-*.safetensors"))) > 1
    for place in ("lm", "shards"):
        byte_tokenizer().save_pretrained(folder / place)
    tiny_model(0).save_pretrained(folder / "checkpoint")
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return shutil.copytree(made, tmp_path / "made")


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON file in place."""
    fields = json.loads(file.read_text())
    change(fields)
    file.write_text(json.dumps(fields))


def retensor(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a safetensors file in place."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def refusal(folder: Path, capsys: pytest.CaptureFixture[str], text: str = TEXT) -> str:
    """What the command line says of writing with a model: one line."""
    source = folder.parent / "text.txt"
    source.write_text(text)
    capsys.readouterr()
    assert main(["write", str(folder), str(source), "-o", str(folder.parent / "out")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("gradmem: error: ")
    assert len(line) < 1000
    return line


# --- Weights that are not all there ----------------------------------------------------------------------


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
    from tests.test_backbone import write_gguf

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


# --- Files name nothing that runs or is fetched ------------------------------------------------------------

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
    for one, text in (("lm", "abc"), ("checkpoint", TEXT)):
        assert gradmem.load(place / one).write(text, 1)
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


# --- Files that lie about their size, and damaged ones ------------------------------------------------------

BOMBS: dict[str, dict[str, Any]] = {
    "width": {"hidden_size": 10**6},
    "layers": {"num_hidden_layers": 10**9},
    "some layers": {"num_hidden_layers": 1000, "hidden_size": 512},
    "vocabulary": {"vocab_size": 10**9},
    "mlp": {"intermediate_size": 10**9},
    "heads": {"num_attention_heads": 10**6, "head_dim": 10**6},
    "classes": {"num_labels": 10**9},
    "positions": {"model_type": "gpt2", "n_positions": 10**10, "n_embd": 16, "n_layer": 1, "n_head": 1},
    "states": {"model_type": "mamba", "state_size": 10**6, "hidden_size": 10**4},
    "experts": {"model_type": "mixtral", "num_local_experts": 10**7},
    "nested": {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "num_hidden_layers": 10**9}},
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("kind", ["lm", "checkpoint"])
def test_no_size_is_believed(place: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    bomb = BOMBS[name]
    edit(place / kind / CONFIG, lambda fields: (fields if kind == "lm" else fields["backbone"]).update(bomb))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if name == "classes":
        assert gradmem.load(place / kind)
    else:
        refusal(place / kind, capsys)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 2**10


@pytest.mark.parametrize(
    "options",
    [{"n_mem": 10**10}, {"write_lora": 10**9}, {"n_ctrl": 10**9}, {"n_mem": "many"},
     {"key_length": 10**9}],
    ids=str,
)  # fmt: skip
def test_no_option_is_believed(place: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    part = "task" if "key_length" in options else "method"
    edit(place / "checkpoint" / CONFIG, lambda fields: fields[part].update(options))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusal(place / "checkpoint", capsys)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 2**10


DAMAGE: dict[str, bytes] = {
    "empty": b"",
    "no object": b"[1]",
    "nothing": b"null",
    "nested": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "nested objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "not UTF-8": b'{"model_type": "\xff\xfe"}',
    "UTF-16": '{"model_type": "llama"}'.encode("utf-16"),
    "cut off": b'{"model_type": "llama", "hidden_si',
    "a large number": b'{"model_type": "llama", "hidden_size": ' + b"9" * 5000 + b"}",
    "other types": b'{"format": 1, "model_type": ["llama"], "backbone": 5, "task": [], "method": null}',
    "half a character": b'{"format": 1, "model_type": "\\ud800", "backbone": {"model_type": "\\ud800"}, '
    b'"task": {"name": "kv"}, "method": {"name": "gradmem"}}',
    "an escape": b'{"model_type": "\\u001b[2J", "format": "\\u001b[2J"}',
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize(
    "file",
    ["lm/config.json", "lm/tokenizer.json", "lm/tokenizer_config.json", "shards/model.safetensors.index.json",
     "checkpoint/config.json", "checkpoint/tokenizer.json", "checkpoint/abstain.safetensors"],
)  # fmt: skip
def test_damaged_json_is_one_line(place: Path, file: str, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    (place / file).write_bytes(DAMAGE[how])
    folder = (place / file).parent
    if file == "checkpoint/tokenizer.json":  # the task kv has letters of its own
        assert gradmem.load(folder).write(TEXT, 1)
    else:
        assert "\x1b" not in refusal(folder, capsys)


@pytest.mark.parametrize("how", [how for how in DAMAGE if how not in ("not UTF-8", "UTF-16")])
def test_damaged_json_about_abstaining_is_one_line(place: Path, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It is in the header of a file of tensors."""
    about = {"format": "2", "about": DAMAGE[how].decode()}
    save_file(gradmem.load("kv-16").abstain.weights, place / "checkpoint" / "abstain.safetensors", about)
    said = refusal(place / "checkpoint", capsys)
    assert "abstain.safetensors is damaged" in said
    assert "\x1b" not in said


def test_abstaining_by_states_of_another_width_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where it says that it is for this model."""
    own = gradmem.load(str(place / "checkpoint"))
    wider = gradmem.load("kv-16").abstain
    assert wider.width != 2 * own.method.backbone.width
    dataclasses.replace(wider, checkpoint=own.fingerprints["checkpoint"]).save(place / "checkpoint")
    assert "is for another model" in refusal(place / "checkpoint", capsys)


@pytest.mark.parametrize("kind", ["lm", "checkpoint"])
@pytest.mark.parametrize(
    "data",
    [b"", b"abc", (2**62).to_bytes(8, "little") + b"{}", (8).to_bytes(8, "little") + b"\xff" * 8, None],
    ids=["empty", "short", "long header", "not UTF-8", "folder"],
)
def test_damaged_weights_are_one_line(
    place: Path, kind: str, data: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    file = place / kind / WEIGHTS
    file.unlink()
    if data is None:
        file.mkdir()
    else:
        file.write_bytes(data)
    assert WEIGHTS in refusal(place / kind, capsys)


@pytest.mark.parametrize("name", ["", "a" * 5000, "a\0b", "\ud800", "/dev/null", "x" * 5000 + ".gguf"])
def test_odd_names_are_refused(name: str) -> None:
    with pytest.raises(GradmemError):
        gradmem.load(name)


@pytest.mark.parametrize(
    "fields",
    [{"dtype": "evil"}, {"dtype": "load"}, {"num_attention_heads": 0}, {"hidden_act": "evil"}, {"hidden_size": "x"},
     {"hidden_size": -4}, {"rope_parameters": {"rope_type": "evil"}}, {"num_hidden_layers": True},
     {"quantization_config": {"quant_method": "evil"}}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("kind", ["lm", "checkpoint"])
def test_fields_that_mean_nothing_are_one_line(
    place: Path, kind: str, fields: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    edit(place / kind / CONFIG, lambda config: (config if kind == "lm" else config["backbone"]).update(fields))
    refusal(place / kind, capsys)


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": split("(a+)+$")},
        {"pre_tokenizer": split("(")},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a|aa)+$"}, "content": ""}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "a"]]}},
        {
            "model": {
                "type": "BPE",
                "vocab": {"a": 0, "b": 1},
                "merges": [["a", "b"]],
                "continuing_subword_prefix": "##",
            }
        },
    ],
    ids=str,
)
def test_tokenizers_that_panic_are_one_line(
    place: Path, change: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    """The library in Rust writes a note of its own as well."""
    edit(place / "lm" / "tokenizer.json", lambda fields: fields.update(change))
    (place / "text.txt").write_text("a" * 60 + "!")
    assert main(["write", str(place / "lm"), str(place / "text.txt"), "-o", str(place / "out")]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1].startswith("gradmem: error: ")
    assert not any("Traceback" in line for line in lines)
