"""Memory files: what is in them, what survives, and what is refused."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import gradmem
from gradmem import GradmemError, Memory, MemoryModel
from gradmem.backbone import Backbone
from gradmem.batch import Tokens
from gradmem.cli.memory_tables import receipt_table
from helpers import tiny_model

TEXT = "a7:Qz\nk2:9f\nzz:aa"
FLOATS = 8 * 16


def header(path: Path) -> tuple[dict, int]:
    """Parse the header by hand; return it with the number of bytes that follow."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), len(data) - 8 - size


def test_round_trip(tiny: MemoryModel, tmp_path: Path) -> None:
    memory = tiny.write(TEXT, 2)
    opened = tiny.open(memory.save(tmp_path / "m.safetensors"))
    assert torch.equal(opened.tensors["memory"], memory.tensors["memory"])
    assert opened.receipts == memory.receipts
    assert opened.ask(["a7", "zz"]) == memory.ask(["a7", "zz"])


@pytest.mark.parametrize(
    ("precision", "bytes_each", "extra"), [("float32", 4, 0), ("float16", 2, 0), ("int8", 1, 8 * 4)]
)
def test_file_holds_the_vectors_and_the_header_only(
    tiny: MemoryModel, tmp_path: Path, precision: str, bytes_each: int, extra: int
) -> None:
    path = tiny.write(TEXT, 1).save(tmp_path / "m.safetensors", precision)
    found, payload = header(path)
    assert payload == FLOATS * bytes_each + extra
    said = json.dumps(found)
    for secret in ("a7", "Qz", "9f", "!k2"):
        assert f'"{secret}' not in said
        assert f":{secret}" not in said
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_no_text_hides_in_the_record(tiny: MemoryModel) -> None:
    """Everything in a receipt but hashes and numbers is the same for any two texts of one length."""
    one, other = (tiny.write(text, 1).receipts[0] for text in ("a7:Qz", "b9:xY"))
    assert {k: v for k, v in vars(one).items() if isinstance(v, str) and k != "context_sha256"} == {
        k: v for k, v in vars(other).items() if isinstance(v, str) and k != "context_sha256"
    }


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 0.0), ("float16", 1e-3), ("int8", 1e-2)])
def test_precision(tiny: MemoryModel, tmp_path: Path, precision: str, tolerance: float) -> None:
    memory = tiny.write(TEXT, 2)
    opened = tiny.open(memory.save(tmp_path / "m.safetensors", precision)).tensors["memory"]
    wanted = memory.tensors["memory"]
    assert float((opened - wanted).abs().max() / wanted.abs().max()) <= tolerance
    assert torch.equal(opened, memory.rounded(precision).tensors["memory"])


def test_record(tiny: MemoryModel) -> None:
    import hashlib

    receipt = tiny.write(TEXT, 2).receipts[0]
    ids = tiny.task.tokenizer("!a7:Qz!!k2:9f!!zz:aa!|").input_ids
    assert receipt.context_tokens == len(ids) == len(receipt.token_losses)
    assert receipt.context_sha256 == hashlib.sha256(TEXT.encode()).hexdigest()
    assert receipt.steps == 2
    assert len(receipt.losses) == 3
    assert receipt.loss_after == pytest.approx(sum(receipt.token_losses) / len(ids), abs=1e-3)
    assert (receipt.loss_before, receipt.loss_after) == (receipt.losses[0], receipt.losses[-1])
    assert receipt.lost == [i for i, loss in enumerate(receipt.token_losses) if loss > 0.6931472]
    assert receipt.method == "gradmem"


def test_answers_at_risk_are_measured_by_reading(tiny: MemoryModel) -> None:
    """Of each pair of the text the loss of its value, read token by token; marks do not count."""
    memory = tiny.write([TEXT, "11:22"], 2)
    for row, pairs in enumerate([[("a7", "Qz"), ("k2", "9f"), ("zz", "aa")], [("11", "22")]]):
        wanted = []
        for key, value in pairs:
            ids = tiny.task.encode(f"?!{key}:{value}")
            with torch.no_grad():
                scores = tiny.method.read(memory[row], Tokens.from_lists([ids]))[0].log_softmax(-1)
            wanted.append(max(-float(scores[5 + i, ids[5 + i]]) for i in range(2)))
        receipt = memory.receipts[row]
        assert receipt.answers == pytest.approx(wanted, abs=2e-3)
        assert receipt.at_risk == [i for i, loss in enumerate(wanted) if loss > math.log(2)]
        assert receipt.to_dict()["at_risk"] == receipt.at_risk


def test_a_memory_may_lose_tokens_that_no_answer_needs() -> None:
    memory = gradmem.load("kv-32").write(TEXT)
    (receipt,) = memory.receipts
    assert memory.ask(["a7", "k2", "zz"]) == ["Qz", "9f", "aa"]
    assert (len(receipt.answers), receipt.at_risk) == (3, [])
    assert len(receipt.lost) > 10


def test_until_stops_each_text_by_its_own_loss(tiny: MemoryModel) -> None:
    texts = ["a7:Qz", TEXT]
    alone = [tiny.write(text, 6).receipts[0].losses for text in texts]
    until = (min(alone[0]) + max(alone[0])) / 2
    expected = [next((i for i, loss in enumerate(losses) if loss <= until), 6) for losses in alone]
    together = tiny.write(texts, until=until, max_steps=6).receipts
    assert [receipt.steps for receipt in together] == expected
    assert together[0].loss_after <= until
    for receipt, losses, steps in zip(together, alone, expected, strict=True):
        assert receipt.losses == pytest.approx(losses[: steps + 1], abs=1e-4)


def test_batch_of_texts_is_each_text_alone(tiny: MemoryModel) -> None:
    texts = ["a7:Qz", TEXT, "11:22\n33:44"]
    batch = tiny.write(texts, 2)
    for row, text in enumerate(texts):
        assert torch.allclose(batch[row].tensors["memory"], tiny.write(text, 2).tensors["memory"], atol=1e-5)
    answers = batch.ask([["a7"], ["k2", "zz"], []])
    assert [len(row) for row in answers] == [1, 2, 0]
    assert answers[1] == batch[1].ask(["k2", "zz"])


def test_many_texts_are_written_in_parts(tiny: MemoryModel, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["a7:Qz", TEXT, "11:22\n33:44", "xx:yy"]
    whole = tiny.write(texts, 2)
    monkeypatch.setattr(Backbone, "tokens_at_once", 50)
    parts = tiny.write(texts, 2)
    assert torch.allclose(parts.tensors["memory"], whole.tensors["memory"], atol=1e-5)
    assert [r.context_sha256 for r in parts.receipts] == [r.context_sha256 for r in whole.receipts]


def test_the_prefix_is_run_once_for_all_questions(tiny: MemoryModel, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, fresh = tiny.write(TEXT), tiny.write(TEXT)
    runs = []
    run = type(tiny.method).prefix
    monkeypatch.setattr(type(tiny.method), "prefix", lambda self, given: runs.append(given) or run(self, given))
    answers = [memory.ask(query) for query in ("a7", "k2", "zz", "a7")]
    assert len(runs) == 1
    assert answers == [*fresh.ask(["a7", "k2", "zz"]), answers[0]]


def test_generate_takes_hugging_face_arguments(tiny: MemoryModel) -> None:
    memory = tiny.write(TEXT)
    torch.manual_seed(0)
    sampled = {memory.ask("a7", do_sample=True, temperature=5.0, max_new_tokens=8) for _ in range(5)}
    assert len(sampled) > 1


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_beams_and_sequences_agree_with_generation_without_a_cache(tiny: MemoryModel, options: dict[str, int]) -> None:
    """The same search by transformers itself, from embeddings of memory and query, one query at a time."""
    memory = tiny.write(TEXT)
    queries, length = ["a7", "k2", "zz"], 4
    answers = memory.ask(queries, max_new_tokens=length, **options)
    embed = tiny.method.backbone.embed
    for query, answer in zip(queries, answers, strict=True):
        ids = torch.tensor([tiny.task.encode(tiny.task.query_text(query))])
        prompt = torch.cat([memory.tensors["memory"], embed(ids)], dim=1)
        settings = {"max_new_tokens": length, "do_sample": False, "eos_token_id": tiny.task.end_id, "pad_token_id": 0}
        mask = torch.ones(prompt.shape[:2], dtype=torch.long)
        wanted = tiny.method.backbone.model.generate(
            inputs_embeds=prompt, attention_mask=mask, **settings, **options
        ).tolist()
        texts = [tiny.task.decode(row) for row in wanted]
        assert answer == (texts if len(texts) > 1 else texts[0])


def test_sampled_sequences_belong_to_their_query(tiny: MemoryModel) -> None:
    answers = tiny.write([TEXT, "a7:Qz"]).ask([["a7", "k2"], ["a7"]], do_sample=True, num_return_sequences=3)
    assert [[len(sequences) for sequences in row] for row in answers] == [[3, 3], [3]]


def test_another_model_refuses(tiny: MemoryModel, other: MemoryModel, tmp_path: Path) -> None:
    path = tiny.write(TEXT).save(tmp_path / "m.safetensors")
    with pytest.raises(GradmemError) as refused:
        other.open(path)
    for model in (tiny, other):
        assert model.fingerprints["checkpoint"][:16] in str(refused.value)


def test_unbound_memory_says_so(tiny: MemoryModel, tmp_path: Path) -> None:
    memory = Memory.load(tiny.write(TEXT).save(tmp_path / "m.safetensors"))
    for request in (lambda: memory.ask("a7"), lambda: memory.answer("a7"), lambda: memory.restore()):
        with pytest.raises(GradmemError, match=r"gradmem\.open"):
            request()
    assert not hasattr(memory, "ask")
    with pytest.raises(AttributeError, match="no attribute 'model'"):
        _ = memory.model
    assert tiny.bind(memory).ask("a7") == tiny.write(TEXT).ask("a7")


def test_parts_of_a_bound_memory_stay_bound(tiny: MemoryModel) -> None:
    memory = tiny.write([TEXT, "a7:Qz"])
    alone = memory.ask([["a7"], ["a7"]])
    for part, row in ((memory[1], 1), (memory.select([0]), 0), (memory.rounded("float32")[-1], 1)):
        assert part.model is tiny
        assert part.ask(["a7"]) == alone[row]
    assert type(Memory.join([memory[0], memory[1]])) is Memory


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "truncated":
        data = data[:-5]
    elif how == "empty":
        data = b""
    elif how == "bit flipped":
        data = data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]
    elif how == "header too long":
        data = struct.pack("<Q", 2**60) + data[8:]
    elif how == "text":
        data = b"hello, this is not a memory"
    elif how == "newer":
        data = data.replace(b'"version":"1"', b'"version":"9"')
    elif how == "foreign":
        data = data.replace(b"gradmem-memory", b"gradmem-mamory")
    elif how == "no receipt":
        data = data.replace(b'\\"method\\"', b'\\"mothod\\"')
    elif how == "options are no table":
        data = data.replace(b'\\"options\\": {}', b'\\"options\\": 55')
    elif how == "options name a method":
        header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
        receipts = json.loads(header["__metadata__"]["records"])
        receipts[0]["options"] = {"name": "other"}
        header["__metadata__"]["records"] = json.dumps(receipts)
        new = json.dumps(header).encode()
        data = struct.pack("<Q", len(new)) + new + data[8 + struct.unpack("<Q", data[:8])[0] :]
    assert data != path.read_bytes()
    path.write_bytes(data)


@pytest.mark.parametrize(
    "how",
    [
        "truncated",
        "empty",
        "bit flipped",
        "header too long",
        "text",
        "newer",
        "foreign",
        "no receipt",
        "options are no table",
        "options name a method",
    ],
)
def test_damaged_file(tiny: MemoryModel, tmp_path: Path, how: str) -> None:
    path = tiny.write(TEXT).save(tmp_path / "m.safetensors")
    damage(path, how)
    with pytest.raises(GradmemError, match=str(path)):
        tiny.open(path)


def test_failed_save_keeps_the_old_file(tiny: MemoryModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny.write(TEXT).save(tmp_path / "m.safetensors")
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(GradmemError, match="No space left"):
        tiny.write("11:22").save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_reads_in_a_new_process_from_the_file_alone(tiny: MemoryModel, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path / "checkpoint")
    model = gradmem.load(tmp_path / "checkpoint")
    memory = model.write(TEXT)
    path = memory.save(tmp_path / "m.safetensors")
    named = f"{str(path)!r}, {str(tmp_path / 'checkpoint')!r}"
    code = f"import gradmem; print(gradmem.open({named}).ask(['a7', 'k2', 'zz']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(memory.ask(["a7", "k2", "zz"]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("a7:Q", "line 1"),
        ("a7:Qz\na7:xx", "twice"),
        ("!aé:Qz!|", "é"),
        ("!a7:Qz!" * 200 + "|", "limit"),
        ("!a7:Qz!!k2:9f!!a7:xx!|", "the key 'a7' occurs twice, with two values"),
        ("just words", "line 1"),
    ],
)
def test_contexts_refused(tiny: MemoryModel, text: str, message: str) -> None:
    with pytest.raises(GradmemError, match=message):
        tiny.write(text)


def test_over_long_context_says_limit_and_length(tiny: MemoryModel) -> None:
    with pytest.raises(GradmemError, match=rf"701 tokens.*{tiny.method.max_context}"):
        tiny.write("!a7:Qz!" * 100 + "|")


@pytest.mark.parametrize(
    ("query", "message"),
    [("", "is no query: ask for a key"), ("abc", "is no query: ask for a key"), ("é7", "is no query: ask for a key")],
)
def test_queries_refused(tiny: MemoryModel, query: str, message: str) -> None:
    with pytest.raises(GradmemError, match=message):
        tiny.write(TEXT).ask(query)


def test_negative_steps(tiny: MemoryModel) -> None:
    with pytest.raises(GradmemError, match="at least 0"):
        tiny.write(TEXT, -1)


def test_steps_and_until_exclude_each_other(tiny: MemoryModel) -> None:
    with pytest.raises(GradmemError, match="not both"):
        tiny.write(TEXT, 2, until=0.1)


def growing(*lengths: int) -> Memory:
    """A memory with as many entries of width 3 as the length of each row, all different from zero."""
    entries = torch.rand(len(lengths), max(lengths), 2, 3) + 1
    for row, length in enumerate(lengths):
        entries[row, length:] = 0
    return Memory({"entries": entries, "lengths": torch.tensor(lengths)})


def test_memories_of_different_lengths_are_joined_and_parted() -> None:
    parts = [growing(2), growing(5, 3), growing(0)]
    joined = Memory.join(parts)
    assert joined.tensors["entries"].shape == (4, 5, 2, 3)
    assert joined.tensors["lengths"].tolist() == [2, 5, 3, 0]
    for row, wanted in enumerate([parts[0], parts[1][0], parts[1][1], parts[2]]):
        assert torch.equal(joined[row].tensors["entries"], wanted.tensors["entries"])
    assert parts[1][1].tensors["entries"].shape == (1, 3, 2, 3)
    assert joined.nbytes == 10 * 6 * 4 + 4 * 8
    assert joined.nbytes == sum(part.nbytes for part in parts)


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_only_floating_point_is_rounded(tmp_path: Path, precision: str) -> None:
    memory = Memory(
        {"vector": torch.rand(2, 3), "count": torch.tensor([2**40 + 1, -3]), "on": torch.tensor([[True], [False]])}
    )
    loaded = Memory.load(memory.save(tmp_path / "m.safetensors", precision))
    for name in ("count", "on"):
        assert loaded.tensors[name].dtype == memory.tensors[name].dtype
        assert torch.equal(loaded.tensors[name], memory.tensors[name])
    assert torch.allclose(loaded.tensors["vector"], memory.tensors["vector"], atol=1e-2)


def test_a_receipt_shows_all_of_the_text_and_lists_some_of_what_was_lost() -> None:
    """In a narrow window, of a text without spaces."""
    tokens = [chr(0x4E00 + i) for i in range(80)]
    receipt = dataclasses.replace(tiny_model(0).write("a1:2b").receipts[0], context_tokens=80, token_losses=[1.0] * 80)
    console = Console(width=50, record=True, file=io.StringIO())
    console.print(receipt_table(receipt, tokens))
    console.print(receipt_table(receipt))
    shown = re.sub(r"[│\s]+", " ", console.export_text())
    assert "…" not in shown
    with_text, without = shown.split("positions lost")
    for number, token in enumerate(tokens):
        listed = f"{token!r}@{number}"
        assert with_text.count(token) == 1 + (listed in with_text)
        assert (listed in with_text) == (number < 50)
    assert "and 30 more" in with_text
    assert "and 30 more" in without
    assert "none" not in without
