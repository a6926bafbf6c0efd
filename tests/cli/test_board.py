"""`gradmem board`: the table, the files, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chat_models import save_model
from gradmem.cli.main import main
from gradmem.data.made_up import made_up_texts
from gradmem.evaluation import board as module
from gradmem.model import MemoryModel
from gradmem.tasks.document import Document
from helpers import TINY_LLAMA, text_model

TIMES = ("write_seconds", "query_ms", "break_even")
ROWS = [
    {"context": f"Ann has {number} dogs.", "question": "How many?", "answers": [str(number)]}
    for number in range(12, 15)
]


GIVEN = ["--data", "questions.jsonl", "--writers", "select", "--budgets", "0.5", "--json", "rows.json"]


def prepared(folder: Path, patch: pytest.MonkeyPatch) -> str:
    """Go to a directory; make a language model of bytes there, beside a file of questions."""
    patch.setattr(module, "ALONG", 3)
    patch.setattr(Document.__init__, "__defaults__", (1024, 4))
    patch.chdir(folder)
    Path("questions.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return save_model(folder / "lm")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A language model of bytes, beside a file of questions."""
    return prepared(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rows of a board that was not stopped."""
    with pytest.MonkeyPatch.context() as patch:
        assert main(["board", prepared(tmp_path_factory.mktemp("whole"), patch), *GIVEN]) == 0
        rows: list[dict[str, Any]] = json.loads(Path("rows.json").read_text())
        return rows


def test_a_board_of_the_controls(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", "rows.json", "--answers", "answers.json", "--figure", "board.png"]
    given = ["--data", "questions.jsonl", "--writers", "full,none,swapped", "--contexts", "2", *files]
    assert main(["board", model, *given]) == 0
    rows = json.loads(Path("rows.json").read_text())
    assert [row["writer"] for row in rows] == ["full", "none", "swapped"]
    assert {(row["data"], row["model"], row["questions"], row["seed"]) for row in rows} == {
        ("questions.jsonl", "lm", 2, 1)
    }
    shown = " ".join(capsys.readouterr().out.split())
    assert "lm: 2 questions on 2 texts of up to 200 words, questions.jsonl, seed 1" in shown
    assert Path("board.png").read_bytes().startswith(b"\x89PNG")
    texts = json.loads(Path("answers.json").read_text())["texts"]
    assert {text["text"] for text in texts} < {row["context"] for row in ROWS}


def test_a_checkpoint_of_full_context_is_asked_through_its_own_task(model: str) -> None:
    task = {"name": "squad", "tokenizer": model, "answer_length": 4}
    built = MemoryModel.from_spec(task, TINY_LLAMA, {"name": "full_context"})
    built.save_pretrained("checkpoint")
    given = ["--data", "questions.jsonl", "--writers", "select", "--budgets", "0.5", "--answers", "answers.json"]
    assert main(["board", "checkpoint", *given]) == 0
    said = json.loads(Path("answers.json").read_text())
    assert said["before"] == []
    (asked,) = said["texts"][0]["questions"]
    assert built.task.text(asked["query"]) == "\nQuestion: How many?\nAnswer:"
    assert set(asked["answers"]) == {"full 1", "none 0", "swapped 0.5", "select 0.5"}


def test_texts_that_are_made_up_need_no_file(model: str) -> None:
    """They come in the order in which they are made up, so that fewer of them are the first ones."""
    given = ["--max_words", "60", "--contexts", "2", "--questions", "1", "--writers", "full", "--seed", "5"]
    files = ["--json", "rows.json", "--answers", "answers.json"]
    assert main(["board", save_model(Path("long"), positions=2048), *given, *files]) == 0
    assert {row["questions"] for row in json.loads(Path("rows.json").read_text())} == {2}
    texts = [text["text"] for text in json.loads(Path("answers.json").read_text())["texts"]]
    assert texts == [text for text, _ in made_up_texts(3, 60, seed=5)[:2]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--writers", "slect"], "unknown writer 'slect': did you mean 'select'"),
        (["--budgets", "2"], "a budget must be a fraction"),
        (["--budgets", "a lot"], "'a lot' is none"),
        (["--data", "empty.jsonl"], "has no questions"),
        (["--data", "none.jsonl"], "cannot read none.jsonl"),
        (["--max_words", "2"], "all 3 texts have more than 2 words"),
        (["--contexts", "1"], "at least 2 texts"),
        (["--questions", "0"], "questions must be at least 1"),
    ],
)
def test_bad_input_is_one_line(
    model: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty.jsonl").write_text("")
    assert main(["board", model, "--data", "questions.jsonl", *options]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_models_that_keep_no_cache_are_refused(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    other: MemoryModel = text_model({"name": "kv", "pairs": 3})
    other.save_pretrained("vectors")
    assert main(["board", "vectors", "--data", "questions.jsonl"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "full_context" in line
    assert not list(Path().glob("*.tmp"))


@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_interrupted_board_goes_on(
    whole: list[dict[str, Any]],
    model: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    at: int,
) -> None:
    """After one text or two, and at the very end; the scores are those of a board that was not stopped."""
    add, added, last = module.Board.add, list[int](), at

    def interrupted(*given: Any) -> None:
        raise KeyboardInterrupt

    def counted(self: module.Board, *given: Any) -> None:
        if len(self.done) == last:
            raise KeyboardInterrupt
        added.append(len(self.done))
        add(self, *given)

    monkeypatch.setattr(module.Board, "add", counted)
    with monkeypatch.context() as stopped:
        stopped.setattr(module.Board, "swap_first", interrupted)
        assert main(["board", model, *GIVEN]) == 130
    told = f"interrupted: kept {at} of 3 texts in rows.json.partial: the same command goes on from there"
    assert told in capsys.readouterr().err
    assert sorted(path.name for path in Path().iterdir()) == ["lm", "questions.jsonl", "rows.json.partial"]
    assert main(["board", model, *GIVEN, "--seed", "2"]) == 2
    assert "rows.json.partial is of another board" in capsys.readouterr().err
    if at > 1:
        assert main(["board", model, *GIVEN, "--contexts", "2"]) == 0, "what there is can be shown before the end"
        assert "on 2 texts of" in capsys.readouterr().out
        assert Path("rows.json.partial").exists() == (at == 3), "what this board did not want is not lost"
        Path("rows.json").unlink()
    added, last = ([] if at == 2 else added), 3
    assert main(["board", model, *GIVEN]) == 0
    assert added == [0, 1, 2], "no text was measured twice"
    found = json.loads(Path("rows.json").read_text())
    for row, wanted in zip(found, whole, strict=True):
        assert {key: value for key, value in row.items() if key not in TIMES} == {
            key: value for key, value in wanted.items() if key not in TIMES
        }
    assert not Path("rows.json.partial").exists()


def test_a_board_without_a_file_keeps_nothing(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module.Board, "swap_first", interrupted)
    assert main(["board", model, "--data", "questions.jsonl", "--writers", "full"]) == 130
    assert sorted(path.name for path in Path().iterdir()) == ["lm", "questions.jsonl"]


def test_a_damaged_partial_file_is_refused(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("rows.json.partial").write_text('{"board"')
    assert main(["board", model, "--data", "questions.jsonl", "--writers", "full", "--json", "rows.json"]) == 2
    assert "rows.json.partial is damaged: delete it" in capsys.readouterr().err


def test_a_text_that_is_too_long_is_refused_before_anything_is_written(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.Board, "add", lambda self, text: pytest.fail("a text was written"))
    long = {**ROWS[0], "context": "dogs " * 120}
    Path("questions.jsonl").write_text("\n".join(map(json.dumps, [*ROWS, long])))
    assert main(["board", model, "--data", "questions.jsonl"]) == 2
    assert "the limit of" in capsys.readouterr().err
