"""A plain language model that answers, and several methods on one backbone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import gradmem
from chat_models import CHATML, save_model
from gradmem import GradmemError, MemoryModel
from gradmem.cli.main import main
from gradmem.tasks.document import INSTRUCTION
from helpers import TINY_LLAMA

TEXT = "Ann signed the report. The door code is 4711."
FULL = {"name": "full_context"}


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("chat") / "lm")


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """A checkpoint of `full_context` with a task of its own."""
    torch.manual_seed(0)
    MemoryModel.from_spec({"name": "kv", "pairs": 3}, TINY_LLAMA, FULL).save_pretrained(tmp_path / "full")
    return str(tmp_path / "full")


def test_an_answer_is_that_of_the_whole_conversation(lm: str) -> None:
    """Also in a batch with another question, and after a text of another length."""
    model = gradmem.load(lm, FULL)
    memory, questions = model.write([TEXT, TEXT * 2]), ["Who signed?", "What is the code of the door?"]
    plain, tokenizer, ends = AutoModelForCausalLM.from_pretrained(lm), model.task.tokenizer, model.task.end_ids
    for text, answers in zip((TEXT, TEXT * 2), memory.ask([questions] * 2, max_new_tokens=12), strict=True):
        for question, answer in zip(questions, answers, strict=True):
            turn = {"role": "user", "content": f"{INSTRUCTION}{text}\n\nQuestion: {question}"}
            given = tokenizer.apply_chat_template([turn], add_generation_prompt=True, return_tensors="pt")
            found = plain.generate(**given, max_new_tokens=12, do_sample=False, eos_token_id=ends, pad_token_id=0)
            assert answer == model.task.decode(found[0, given["input_ids"].shape[1] :].tolist())


def test_a_memory_of_no_text_is_the_beginning_of_the_turn(lm: str) -> None:
    model = gradmem.load(lm, FULL)
    memory = model.write([TEXT, TEXT * 2], 0)
    assert memory.tensors["lengths"].tolist() == [len(model.task.before_context)] * 2
    whole = model.write(TEXT).tensors["keys"]
    assert torch.allclose(memory.tensors["keys"][1], whole[0, : memory.tensors["keys"].shape[1]], atol=1e-5)


def test_two_commands_answer(lm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, memory = tmp_path / "report.md", str(tmp_path / "memory")
    file.write_text(TEXT)
    assert main(["write", lm, str(file), "--method", "full_context", "-o", memory]) == 0
    capsys.readouterr()
    assert main(["ask", memory, "Who signed?", "--checkpoint", lm]) == 0
    assert capsys.readouterr().out == gradmem.load(lm, FULL).write(TEXT).ask("Who signed?") + "\n"
    assert main(["inspect", memory]) == 0
    assert TEXT.encode() not in Path(memory).read_bytes()
    assert main(["ask", memory, " ", "--checkpoint", lm]) == 2
    assert "the query is empty" in capsys.readouterr().err


def test_another_template_is_another_model(lm: str, tmp_path: Path) -> None:
    gradmem.load(lm, FULL).write(TEXT).save(tmp_path / "memory")
    other = save_model(tmp_path / "other", CHATML.replace("kind", "good"))
    with pytest.raises(GradmemError, match="a memory answers only through the model that wrote it"):
        gradmem.open(tmp_path / "memory", other)
    assert gradmem.open(tmp_path / "memory", save_model(tmp_path / "same")).ask("Who?") is not None


def test_other_methods_on_one_backbone(lm: str, tmp_path: Path) -> None:
    """A plain model binds what any of them wrote, with the task of the method."""
    model = gradmem.load(lm, FULL)
    cram = {"name": "cram", "n_mem": 2, "write_steps": 2}
    recited = gradmem.load(lm, cram).write(TEXT)
    bound = model.bind(recited)
    assert bound.model.method.backbone is model.method.backbone
    assert (bound.model.spec["task"]["name"], model.spec["task"]["name"]) == ("raw_text", "document")
    assert bound.restore() == recited.restore()
    assert model.bind(recited).model is bound.model
    assert model.bind(model.write(TEXT)).model is model


def test_another_method_on_a_checkpoint(checkpoint: str, tmp_path: Path) -> None:
    own = gradmem.load(checkpoint)
    assert gradmem.load(checkpoint, FULL).fingerprints == own.fingerprints
    model = gradmem.load(checkpoint, {"name": "cram", "n_mem": 2, "write_steps": 2})
    assert model.task.query_text("a7") == own.task.query_text("a7")
    memory = model.write("a7:Qz\n")
    memory.save(tmp_path / "memory")
    assert memory.receipts[0].options == {"n_mem": 2, "write_steps": 2}
    assert gradmem.open(tmp_path / "memory", checkpoint).restore() == memory.restore()
    own.write("a7:Qz\n").save(tmp_path / "own")
    assert gradmem.open(tmp_path / "own", checkpoint).ask("a7") == own.write("a7:Qz\n").ask("a7")


def test_a_trained_method_stays(tiny: MemoryModel, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path / "tiny")
    with pytest.raises(GradmemError, match="has a method of its own: only plain language models and checkpoints of"):
        gradmem.load(tmp_path / "tiny", FULL)


def test_options_from_a_file_build_nothing_large(lm: str) -> None:
    """A memory file may say that a method of any size wrote it."""
    model = gradmem.load(lm, FULL)
    memory = gradmem.load(lm, {"name": "cram", "n_mem": 2, "write_steps": 1}).write(TEXT)
    memory.receipts = [replace(memory.receipts[0], options={"n_mem": 2**40})]
    with pytest.raises(GradmemError, match="n_mem is 1099511627776"):
        model.bind(memory)


def test_a_model_without_room_for_a_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What stands before a text takes half of its positions already."""
    short = save_model(tmp_path / "short", positions=64)
    (tmp_path / "text").write_text(TEXT)
    capsys.readouterr()
    assert main(["write", short, str(tmp_path / "text"), "--method", "full_context"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.endswith("takes 64 tokens, which leave no room for a text: take another model")
