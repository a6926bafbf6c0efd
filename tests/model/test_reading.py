"""Plain language models, texts in chunks, and reading texts back from memory files alone."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import gradmem
from chat_models import save_model
from gradmem import GradmemError, Memory, MemoryModel
from gradmem.cli.main import _note, main
from gradmem.receipts import written_texts
from helpers import DATA, needs

TEXT = "abc ☃é\r\nxy"
OWN = {"n_mem": 8, "inner_lr": 0.1, "write_steps": 250}
CRAM = {"name": "cram", **OWN}
OPTIONS = [f"--{name}={value}" for name, value in OWN.items()]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random language model of bytes, as transformers saves it: a snowman is three tokens."""
    folder = tmp_path_factory.mktemp("lm")
    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | {"</s>": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=257, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.3, eos_token_id=256, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(lm: Path) -> MemoryModel:
    return gradmem.load(lm, CRAM)


@pytest.fixture(scope="module")
def place(lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, and its memory of several chunks, written by the command line."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "t.txt").write_bytes(TEXT.encode())
    arguments = ["--method=cram", *OPTIONS, "--until=0.05", "--chunk_size=6", "-o", f"{folder}/m"]
    assert main(["write", str(lm), f"{folder}/t.txt", *arguments]) == 0
    return folder


def test_cram_says_that_it_does_not_answer(
    lm: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the receipt, in the help, and in one line beside the answers."""
    assert main(["write", str(lm), f"{place}/t.txt", "--method=cram", "--steps=1", "-o", f"{tmp_path}/m"]) == 0
    assert "cram recites its text and does not answer questions" in capsys.readouterr().out
    for command in ("write", "ask"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "not answer questions" in " ".join(capsys.readouterr().out.split())
    note = warnings.WarningMessage(
        "it recites", UserWarning, str(Path(gradmem.__file__).parent / "model" / "model.py"), 1
    )
    _note(note.message, note.category, note.filename, note.lineno)
    assert capsys.readouterr().err == "gradmem: note: it recites\n"
    _note("old", DeprecationWarning, "elsewhere.py", 1)
    assert "elsewhere.py:1: DeprecationWarning: old" in capsys.readouterr().err


# --- A plain language model ------------------------------------------------------------------------------


def test_loading_draws_always_the_same(lm: Path, model: MemoryModel) -> None:
    torch.manual_seed(3)
    again = gradmem.load(lm, CRAM)
    assert again.fingerprints == model.fingerprints
    assert gradmem.load(lm, {"name": "cram"}).method.n_mem == 16
    assert gradmem.load(lm, CRAM | {"n_mem": 4}).fingerprints["checkpoint"] != model.fingerprints["checkpoint"]


def test_no_embedding_is_added(model: MemoryModel) -> None:
    assert model.method.backbone.model.get_input_embeddings().num_embeddings == 257


def test_same_text_same_memory(lm: Path, model: MemoryModel) -> None:
    one, two = model.write("abc", 5), gradmem.load(lm, CRAM).write("abc", 5)
    assert torch.equal(one.tensors["memory"], two.tensors["memory"])
    assert one.receipts == two.receipts


def test_a_query_is_continued(model: MemoryModel) -> None:
    memory = model.write("abc", 2)
    assert isinstance(memory.ask("ab", max_new_tokens=3), str)


def test_file_finds_its_language_model(place: Path, lm: Path) -> None:
    opened = gradmem.open(place / "m")
    assert opened.model.name == str(lm)
    assert opened.model.spec["method"] == CRAM


def test_refused(lm: Path, tmp_path: Path) -> None:
    with pytest.raises(GradmemError, match="method of its own"):
        gradmem.load("kv-32", {"name": "cram"})
    with pytest.raises(GradmemError, match="unknown cram method option 'n_men'"):
        gradmem.load(lm, {"name": "cram", "n_men": 3})
    with pytest.raises(GradmemError, match="no samples"):
        gradmem.load(lm, {"name": "cram"}).task.batch("test", 0, 1)


# --- Chunks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a" * 12, "a" * 13, "abc", "a☃☃☃☃b", "é" * 9, TEXT])
def test_chunks(model: MemoryModel, text: str) -> None:
    """In a byte tokenizer the tokens of a text are its bytes: no chunk has more, nor fewer where one would fit."""
    chunks = model.encoder.chunks(text, 6)
    assert "".join(chunks) == text
    assert all(0 < len(chunk.encode()) <= 6 for chunk in chunks)
    for chunk, after in itertools.pairwise(chunks):
        assert len((chunk + after[0]).encode()) > 6


def test_chunk_sizes(model: MemoryModel) -> None:
    assert list(map(len, model.encoder.chunks("a" * 130))) == [56, 56, 18], "64 positions without 8 vectors"
    assert model.encoder.chunks("", 6) == [""]
    with pytest.raises(GradmemError, match="one character has more than"):
        model.encoder.chunks("☃", 2)
    with pytest.raises(GradmemError, match="at least 1 token"):
        model.encoder.chunks("abc", 0)


def test_written_texts(model: MemoryModel) -> None:
    chunks = model.encoder.chunks(TEXT, 6)
    receipts = model.write(chunks, 0).receipts
    digests = [hashlib.sha256(chunk.encode()).hexdigest() for chunk in chunks]
    assert written_texts(TEXT, receipts, "it") == dict(zip(digests, chunks, strict=True))
    assert written_texts(chunks[1], receipts, "it") == {digests[1]: chunks[1]}
    for wrong in (TEXT + "z", TEXT[:-1], "z" + TEXT, ""):
        with pytest.raises(GradmemError, match="it is not the text"):
            written_texts(wrong, receipts, "it")


# --- Restoring -------------------------------------------------------------------------------------------


def test_restores_exactly(place: Path, lm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the file alone: the text is not there any more."""
    memory = gradmem.open(place / "m")
    assert len(memory) == 3
    assert [receipt.lost for receipt in memory.receipts] == [[]] * 3
    assert max(receipt.loss_after for receipt in memory.receipts) < 0.06
    assert "".join(memory.restore()) == TEXT
    assert main(["restore", f"{place}/m", "-o", f"{tmp_path}/r.txt"]) == 0
    assert (tmp_path / "r.txt").read_bytes() == TEXT.encode()
    assert "yes" in capsys.readouterr().err
    assert main(["restore", f"{place}/m", "--context", f"{place}/t.txt"]) == 0
    captured = capsys.readouterr()
    assert captured.out == TEXT
    assert "13 of 13 (100.00%)" in captured.err
    assert "none" in captured.err


def test_restore_is_the_search_of_transformers(model: MemoryModel) -> None:
    """Whatever a memory holds; here one that is far from written."""
    memory = model.write(["abcdef", "xyz"], 3)
    found = memory.reconstruct()
    assert list(map(len, found)) == [6, 3]
    for row, ids in enumerate(found):
        wanted = model.method.backbone.model.generate(
            inputs_embeds=memory.tensors["memory"][row : row + 1],
            attention_mask=torch.ones(1, 8),
            max_new_tokens=len(ids),
            min_new_tokens=len(ids),
            do_sample=False,
            pad_token_id=0,
        )
        assert wanted[0].tolist() == ids


def test_says_what_differs(model: MemoryModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Counted by hand from the tokens of an unwritten memory."""
    (tmp_path / "t.txt").write_text("abcdef")
    memory = model.write("abcdef", 0)
    memory.save(tmp_path / "m")
    (ids,) = memory.reconstruct()
    wanted = model.task.encode("abcdef")
    right = sum(a == b for a, b in zip(ids, wanted, strict=True))
    assert right < 6, "the test should see differences"
    assert main(["restore", f"{tmp_path}/m", "--context", f"{tmp_path}/t.txt", "-o", f"{tmp_path}/r"]) == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert "0 of 1 chunks" in shown
    assert f"{len(memory.receipts[0].lost)} of 6 (loss above" in shown
    assert f"{right} of 6" in shown
    first = next(i for i in range(6) if ids[i] != wanted[i])
    assert f"chunk 1, token {first}" in shown


def test_inspect_with_chunks(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"{place}/m", "--context", f"{place}/t.txt"]) == 0
    assert capsys.readouterr().out.count("text (lost in red)") == 3


def test_bad_input(place: Path, lm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.txt").write_text("other")
    damaged = bytearray((place / "m").read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "damaged").write_bytes(damaged)
    opened = Memory.load(place / "m")
    opened.receipts[0].options["n_mem"] = 3
    opened.save(tmp_path / "another")
    receipt = json.loads(json.dumps(vars(opened.receipts[0]))) | {"context_tokens": 10**9, "options": OWN}
    Memory(opened[0].tensors, [type(opened.receipts[0])(**receipt)]).save(tmp_path / "endless")
    cases = {
        ("restore", f"{place}/m", "--context", f"{tmp_path}/other.txt"): "not the text that was written",
        ("restore", f"{place}/m", "-o", f"{tmp_path}/other.txt/r"): "cannot write",
        ("restore", f"{tmp_path}/damaged"): "does not match its checksum|damaged",
        ("restore", f"{tmp_path}/another"): "was written by the checkpoint",
        ("restore", f"{tmp_path}/endless"): "cannot hold contexts of 1000000000 tokens",
        ("restore", f"{tmp_path}/none"): "no memory file",
        ("write", str(lm), f"{place}/t.txt", "--method", "cram", "--n_men", "3"): "did you mean 'n_mem'",
        ("write", str(lm), f"{place}/t.txt", "--method", "crem"): "did you mean 'cram'",
        ("write", str(lm), f"{place}/t.txt", "--method", "cram", "--chunk_size", "2"): "one character has more than",
        ("write", "kv-32", f"{place}/t.txt", "--method", "cram"): "method of its own",
    }
    for arguments, message in cases.items():
        assert main(list(arguments)) == 2, arguments
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gradmem: error: ")]
        assert re.search(message, line), line


@needs("stories260K_hf")
def test_a_pretrained_model(tmp_path: Path) -> None:
    """A tokenizer that puts a space before every text, and bytes for what it lacks."""
    model = gradmem.load(DATA / "stories260K_hf", {"name": "cram", "n_mem": 8, "write_steps": 80})
    text = "  Lily saw a ☃. She\nwas happy."
    chunks = model.encoder.chunks(text, 10)
    assert "".join(chunks) == text
    assert all(model.task.text(model.task.encode(chunk)) == chunk for chunk in chunks)
    memory = model.write("Once upon a time there was a dog", until=0.1)
    assert gradmem.open(memory.save(tmp_path / "m")).restore() == ["Once upon a time there was a dog"]


@pytest.mark.parametrize("method", ["full_context", "compact", "vectors"])
def test_a_text_of_one_token(method: str, tmp_path: Path) -> None:
    """It is written and asked as any other; what stands beside it in a batch changes nothing."""
    model = gradmem.load(save_model(tmp_path), {"name": method} | ({"write_steps": 1} if method == "vectors" else {}))
    alone, both = model.write("-"), model.write(["-", "Ann signed."])
    assert len(alone.receipts[0].token_losses) == 1
    assert alone.ask(["Who?", "When?"], max_new_tokens=4) == both[0].ask(["Who?", "When?"], max_new_tokens=4)
