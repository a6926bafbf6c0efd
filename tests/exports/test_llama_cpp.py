"""Sequence states for llama.cpp, byte by byte; tests/system/test_llama_cpp.py lets llama.cpp itself read them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gradmem
from chat_models import save_model
from families import tiny_model
from gradmem import BoundMemory
from gradmem.cli.main import main
from gradmem.exports.asking import prompt, prompt_ids
from gradmem.exports.llama_cpp import save_state
from gradmem.exports.targets import export

TEXT = "Clara signed the minutes in Velmouth."
COMPACT = {"name": "compact", "budget": 9, "shared": False, "writers": "select"}
LAYERS, HEADS, WIDTH, ENTRIES = 2, 1, 8, 9


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> BoundMemory:
    memory: BoundMemory = gradmem.load(save_model(tmp_path_factory.mktemp("model")), COMPACT).write(TEXT)
    return memory


def test_the_state_is_laid_out_as_llama_cpp_reads_it(memory: BoundMemory, tmp_path: Path) -> None:
    """Values as they are; keys with the neighbours that llama.cpp turns together, which transformers keeps apart."""
    assert save_state(memory, tmp_path / "m.bin") == ENTRIES
    data = (tmp_path / "m.bin").read_bytes()

    def take(form: str) -> Any:
        nonlocal data
        size = struct.calcsize(form)
        taken, data = struct.unpack(form, data[:size]), data[size:]
        return list(taken)

    assert take("<3I") == [int.from_bytes(b"ggsq", "big"), 4, ENTRIES]
    assert take(f"<{ENTRIES}i") == json.loads((tmp_path / "m.bin.json").read_text())["memory"]
    assert take("<2I") == [1, ENTRIES]
    assert [take("<iIi") for _ in range(ENTRIES)] == [[position, 1, 0] for position in range(ENTRIES)]
    assert take("<4I") == [0, LAYERS, 0, 0]
    for part in ("keys", "values"):
        for layer in memory.prefix.cache.layers:
            assert take("<iQ") == [1, HEADS * WIDTH * 2]
            cells = np.array([take(f"<{HEADS * WIDTH}e") for _ in range(ENTRIES)])
            wanted = getattr(layer, part)[0, 0].numpy()
            if part == "keys":
                wanted = wanted[:, [0, 4, 1, 5, 2, 6, 3, 7]]
            assert np.allclose(cells, wanted, rtol=2**-10, atol=1e-6)
    assert not data


def test_the_file_beside_it_says_how_to_ask(memory: BoundMemory, tmp_path: Path) -> None:
    """Its texts are tokenized apart from the question, as READ tokenizes them; the ids are no special tokens."""
    save_state(memory, tmp_path / "m.bin")
    file, tokenizer = tmp_path / "m.bin.json", memory.model.task.tokenizer
    ids = json.loads(file.read_text())["memory"]
    asked = prompt(file, "Who signed it?")
    assert asked[:ENTRIES] == ids
    texts = [tokenizer(text, add_special_tokens=False).input_ids for text in asked[ENTRIES:]]
    assert [*ids, *(one for text in texts for one in text)] == prompt_ids(memory, ids, "Who signed it?")
    assert not set(ids) & set(tokenizer.added_tokens_decoder)
    other = memory.model.write(TEXT + " So.")
    save_state(other, file.with_name("other.bin"))
    assert json.loads(file.with_name("other.bin.json").read_text())["memory"] != ids
    file.write_text("{}")
    with pytest.raises(gradmem.GradmemError, match="does not say how to ask"):
        prompt(file, "Who?")


def test_what_llama_cpp_cannot_hold_says_why(
    memory: BoundMemory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command, with one line; nothing is saved."""
    shared = gradmem.load(memory.model.name, COMPACT | {"shared": True, "budget": 0.2}).write(TEXT)
    apart = gradmem.load(memory.model.name, COMPACT | {"positions": "text"}).write(TEXT)
    large = memory.model.bind(memory)
    large.tensors = {**memory.tensors, "values": torch.full_like(memory.tensors["values"], 1e5)}
    cases = [
        (shared, "write it with --shared false"),
        (apart, "write it with --shared false --positions memory"),
        (gradmem.Memory.join([memory, memory]), "has 2 chunks"),
        (large, "numbers that float16 cannot hold"),
    ]
    for one, why in cases:
        file = one.save(tmp_path / "one.safetensors")
        command = ["export", str(file), "--to", "llama.cpp", "--checkpoint", memory.model.name]
        assert main([*command, "-o", str(tmp_path / "m.bin")]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert why in line
        assert not (tmp_path / "m.bin").exists()


@pytest.mark.parametrize(
    ("kind", "fields", "why"),
    [
        ("gemma", {}, "how llama.cpp keeps the keys of 'gemma' is not known"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "'linear'"),
    ],
)
def test_other_models_are_refused(memory: BoundMemory, kind: str, fields: Any, why: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_model(kind, vocab_size=259, max_position_embeddings=1024, **fields).save_pretrained(folder)
    memory.model.task.tokenizer.save_pretrained(folder)
    other = gradmem.load(folder, COMPACT).write("a b")
    with pytest.raises(gradmem.GradmemError, match=why):
        export(other, "llama.cpp", tmp_path / "m.bin")
