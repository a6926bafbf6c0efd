"""Model files that lie about their size, and damaged ones: one line each."""

from __future__ import annotations

import dataclasses
import resource
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

import gradmem
from gradmem import GradmemError
from gradmem.cli.main import main
from gradmem.model.checkpoint import FORMAT
from model_files import CONFIG, TEXT, WEIGHTS, edit, refusal

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
    "other types": b'{"format": %d, "model_type": ["llama"], "backbone": 5, "task": [], "method": null}' % FORMAT,
    "half a character": b'{"format": %d, "model_type": "\\ud800", "backbone": {"model_type": "\\ud800"}, '
    b'"task": {"name": "kv"}, "method": {"name": "gradmem"}}' % FORMAT,
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
