"""Long texts: chunk by chunk, interrupted, killed, resumed, and changed."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import gradmem
from chat_models import save_model
from gradmem import Memory, MemoryModel
from gradmem.cli import long_texts
from gradmem.cli.main import main
from gradmem.compaction.questions import HELD_OUT
from gradmem.store import Store

PARTS = ["Ann signed the paper.\n", "The code is 4711.\n", "It rained all day.\n", "Bob came by train."]
TEXT = "".join(PARTS)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_model(tmp_path / "lm")
    (tmp_path / "book.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(*more: str) -> int:
    line = ["write", "lm", "book.txt", "--method=compact", "--writers=select", "--budget=0.5", "--chunk_size=22"]
    return main([*line, "-o", "m", *more])


def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that are written from now on."""
    texts: list[str] = []
    own = MemoryModel.write

    def noting(self: MemoryModel, text: Any, *given: Any, **options: Any) -> Any:
        texts.extend(text)
        return own(self, text, *given, **options)

    monkeypatch.setattr(MemoryModel, "write", noting)
    return texts


def stop_after(monkeypatch: pytest.MonkeyPatch, chunks: int) -> None:
    """Interrupt when the bar shows so many chunks."""
    shown: list[str] = []

    def interrupt(receipt: gradmem.Receipt) -> str:
        shown.append(receipt.context_sha256)
        if len(shown) == chunks:
            signal.raise_signal(signal.SIGINT)
        return ""

    monkeypatch.setattr(long_texts, "fidelity", interrupt)


def same(one: Memory, other: Memory) -> bool:
    return one.receipts == other.receipts and all(torch.equal(one.tensors[n], other.tensors[n]) for n in one.tensors)


def test_every_chunk_is_a_readable_part_in_a_row_of_its_own(place: Path) -> None:
    assert write() == 0
    memory = gradmem.open("m")
    assert [receipt.context_sha256 for receipt in memory.receipts] == [
        gradmem.receipts.text_digest(part) for part in PARTS
    ]
    assert same(memory, Memory.join([memory.model.write(part) for part in PARTS]))


def test_ask_reads_all_chunks(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert write() == 0
    capsys.readouterr()
    assert main(["ask", "m", "What is the code?", "--jsonl"]) == 0
    told = json.loads(capsys.readouterr().out)
    memory = gradmem.open("m")
    assert told["answer"] == memory.ask("What is the code?") == memory.together(range(4)).ask("What is the code?")


def test_a_change_moves_few_chunks(place: Path) -> None:
    """The cuts after it are soon the same again."""
    encoder = gradmem.load("lm", {"name": "compact"}).encoder
    for seed in range(5):
        draw = random.Random(seed)
        sentences = ["".join(draw.choices("abcde ", k=draw.randint(20, 60))) + ". " for _ in range(200)]
        before = encoder.chunks("".join(sentences), 800)
        sentences[30] = "Something else that is longer than the sentence which was here. "
        after = encoder.chunks("".join(sentences), 800)
        assert "".join(after) == "".join(sentences)
        assert all(len(chunk) <= 800 and chunk.rstrip().endswith(".") for chunk in after)
        assert 1 <= len(set(after) - set(before)) <= len(after) // 2


def test_an_interrupted_write_goes_on(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert write() == 0
    whole = Memory.load("m")
    with monkeypatch.context() as interrupted:
        stop_after(interrupted, 2)
        assert write() == 130
    told = capfd.readouterr().err
    assert "interrupted: saved 2 of 4 chunks in m: the same command with --resume goes on" in told
    assert same(Memory.load("m"), whole.select([0, 1]))
    assert isinstance(gradmem.open("m").ask("What is the code?", max_new_tokens=2), str), "what is done can be asked"
    texts = written(monkeypatch)
    assert write("--resume") == 0
    assert texts == PARTS[2:]
    assert same(Memory.load("m"), whole)


def test_a_killed_write_loses_what_was_not_saved(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_texts, "SAVE_SECONDS", -1.0)
    monkeypatch.setattr(long_texts, "SAVE_TIMES", 0)

    class Killed(BaseException):
        pass

    own = MemoryModel.write

    def dies(self: MemoryModel, text: list[str], *given: Any, **options: Any) -> Any:
        if text == [PARTS[2]]:
            raise Killed
        return own(self, text, *given, **options)

    with monkeypatch.context() as killed:
        killed.setattr(MemoryModel, "write", dies)
        with pytest.raises(Killed):
            write()
    texts = written(monkeypatch)
    assert write("--resume") == 0
    assert texts == PARTS[2:]


def test_only_what_changed_is_written_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert write() == 0
    old = Memory.load("m")
    (place / "book.txt").write_text(TEXT.replace("4711", "1234"))
    texts = written(monkeypatch)
    assert write("--resume") == 0
    assert texts == ["The code is 1234.\n"]
    new = Memory.load("m")
    assert same(new.select([0, 2, 3]), old.select([0, 2, 3]))
    assert not same(new.select([1]), old.select([1]))
    texts.clear()
    assert write("--resume", "--budget=0.4") == 0
    assert len(texts) == len(PARTS), "other options write something else"


def test_what_was_written_with_other_questions_is_written_again(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (place / "own.txt").write_text("Who signed the paper?\nWhat is the code?\n")
    (place / "more.txt").write_text("Who signed the paper?\nWho came by train?\n")
    with monkeypatch.context() as interrupted:
        stop_after(interrupted, 2)
        assert write("--questions=own.txt") == 130
    texts = written(monkeypatch)
    for questions, wanted in (("own.txt", PARTS[2:]), ("more.txt", PARTS), (None, PARTS)):
        texts.clear()
        capfd.readouterr()
        assert write("--resume", *([f"--questions={questions}"] if questions else [])) == 0
        assert texts == wanted
        assert f"took over {len(PARTS) - len(wanted)} of 4 chunks" in capfd.readouterr().out
    digests = {receipt.questions_sha256 for receipt in Memory.load("m").receipts}
    assert digests == {""}


def test_what_was_written_with_more_steps_is_written_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert write("--steps=1") == 0
    texts = written(monkeypatch)
    assert write("--resume", "--steps=0") == 0
    assert texts == PARTS


def test_a_file_of_another_precision_is_not_resumed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert write("--precision=int8") == 0
    assert write("--resume") == 2
    assert "m holds int8: resume with --precision int8" in capsys.readouterr().err
    assert write("--resume", "--precision=int8") == 0


def test_options_of_a_checkpoint_are_in_its_receipts(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written with other steps of descent before Gauss-Newton steps is not taken over."""
    (place / "pairs.txt").write_text("a7:Qz\nk2:9f")
    line = ["write", "kv-16", "pairs.txt", "--steps=1", "-o", "pairs", "--resume"]
    texts = written(monkeypatch)
    for more in ([], ["--gauss_newton_after=0"], ["--gauss_newton_after=0"]):
        assert main([*line, *more]) == 0
    assert texts == ["a7:Qz\nk2:9f"] * 2
    assert Memory.load("pairs").receipts[0].options == {"gauss_newton_after": 0}


def test_nothing_is_saved_before_the_first_chunk(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    own = MemoryModel.write

    def interrupted(self: MemoryModel, *given: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return own(self, *given, **options)

    monkeypatch.setattr(MemoryModel, "write", interrupted)
    assert write() == 130
    assert "no chunk was finished, so nothing is saved" in capfd.readouterr().err
    assert not (place / "m").exists()


def test_an_interrupted_write_is_not_stored(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as interrupted:
        stop_after(interrupted, 3)
        assert write("--store", "--name", "book") == 130
    with Store() as store:
        assert list(store.list()) == []
    texts = written(monkeypatch)
    assert write("--store", "--name", "book", "--resume") == 0
    assert texts == PARTS[3:]
    with Store() as store:
        assert len(store.load("book")) == len(PARTS)


def test_a_damaged_file_is_not_resumed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "m").write_bytes(b"no memory")
    assert write("--resume") == 2
    assert "m is damaged or no memory file" in capsys.readouterr().err


def test_the_users_questions(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every fourth is held out; files that hold none, or another language, are refused before the work."""
    Path("own.txt").write_text("Who signed the paper?\nWhat is the code?\n\nWho came by train?\nDid it rain all day?\n")
    assert write("--questions=own.txt") == 0
    asked = [receipt.fidelity["questions"] for receipt in Memory.load("m").receipts]
    assert asked == [len(HELD_OUT) + 1] * len(PARTS)
    Path("none.txt").write_text("\n \n")
    Path("other.txt").write_text("Wer hat unterschrieben?\nWie lautet die Nummer?\n")
    for more, message in (
        (["--questions=none.txt"], "holds no question"),
        (["--questions=other.txt"], "language of the text"),
        (["--questions=own.txt", "--method=full_context"], "only the methods compact and vectors"),
    ):
        capsys.readouterr()
        line = ["write", "lm", "book.txt", *more, "-o", "n"]
        assert main(line) == 2
        (told,) = capsys.readouterr().err.strip().splitlines()
        assert message in told
        assert not Path("n").exists()
