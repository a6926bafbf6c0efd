"""The qa task: contexts, questions, what is left out, how files are mixed."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import gradmem
from gradmem.cli.main import main
from gradmem.data.squad_files import read_rows
from gradmem.errors import GradmemError
from gradmem.model import MemoryModel
from gradmem.model.build import build_task
from gradmem.tasks.qa import QA
from gradmem.tasks.text import byte_tokenizer
from helpers import DATA, TINY_LLAMA, needs

NAMES = ["Ada", "Bo", "Cy", "Di", "Ed", "Flo", "Gus", "Hal", "Ida", "Jo", "Kit", "Lou", "Max", "Ned", "Oz", "Pam"]
HIDDEN = "the very old lighthouse keeper counted seven grey gulls"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with a tokenizer in which every byte is a token."""
    place = tmp_path_factory.mktemp("bytes")
    byte_tokenizer().save_pretrained(place)
    return str(place)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Paragraphs, single sentences, a book and a test file."""
    monkeypatch.setenv("GRADMEM_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "data"
    place.mkdir()

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        (place / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def about(name: str) -> dict[str, Any]:
        questions = [("Where is NAME?", f"room of {name}"), ("Who walks?", name), ("Who is it?", "Nobody")]
        qas = [{"question": q.replace("NAME", name), "answers": [a]} for q, a in questions]
        return {"context": f"{name} walks to the room of {name}. It rains there.", "qas": qas}

    write("train.jsonl", [about(name) for name in NAMES])
    write("sentences.jsonl", [{**about(name), "context": f"{name} walks to the room of {name} ."} for name in NAMES])
    write("test.jsonl", [{"context": f"At night {HIDDEN}.", "qas": [{"question": "Who?", "answers": ["x"]}]}])
    (place / "book.txt").write_text("\n".join(f"{name} lived in a wide green valley near {name}ton." for name in NAMES))
    return place


def qa(tokenizer: str, data: Path | None, mix: dict[str, float], **options: Any) -> QA:
    """Build the task as a recipe does."""
    task = build_task({"name": "qa", "tokenizer": tokenizer, "data": data and str(data), "mix": mix, **options})
    assert isinstance(task, QA)
    return task


def contexts(task: QA, entry: int = 0) -> list[str]:
    """All training contexts of an entry."""
    part = task.parts[entry]
    return [task.text(part[i].context.tolist()) for i in range(len(part))]


def questions(task: QA, entry: int = 0) -> list[list[str]]:
    """Prompts with answers of each of them."""
    part = task.parts[entry]
    return [[task.text(list(query.ids)) for query in part[i].queries] for i in range(len(part))]


def test_whole_paragraphs_are_asked_everything(tokenizer: str, data: Path) -> None:
    """Also what the paragraph does not say word for word; and gaps make up for what is missing to four questions."""
    task = qa(tokenizer, data, {"train.jsonl": 1})
    assert contexts(task) == [f"{name} walks to the room of {name}. It rains there." for name in NAMES[1:]]
    end = task.tokenizer.eos_token
    for name, asked in zip(NAMES[1:], questions(task), strict=False):
        assert asked[0] == f"\nQuestion: Where is {name}?\nAnswer: room of {name}{end}"
        assert asked[2] == f"\nQuestion: Who is it?\nAnswer: Nobody{end}"
    valid = task.samples("valid")
    assert [task.text(valid[0].context.tolist())] == ["Ada walks to the room of Ada. It rains there."]
    assert [query.references for query in valid[0].queries] == [["room of Ada"], ["Ada"], ["Nobody"]]


def test_a_part_is_asked_what_stands_in_it_and_nowhere_else(tokenizer: str, data: Path) -> None:
    """Paragraphs are cut at the ends of sentences; `Ada` stands twice in one, `room of Ada` once."""
    task = qa(tokenizer, data, {"train.jsonl": 1}, max_context=36)
    assert contexts(task)[:2] == ["Bo walks to the room of Bo.", "Cy walks to the room of Cy."]
    assert all("Nobody" not in text for asked in questions(task) for text in asked)
    assert all(f"Where is {name}?" in asked[0] for name, asked in zip(NAMES[1:], questions(task), strict=False))


def test_neighbours_are_joined_from_every_one_on(tokenizer: str, data: Path) -> None:
    """With plain spaces; a question that two of them have is not asked."""
    task = qa(tokenizer, data, {"sentences.jsonl": 1}, merge=["sentences.jsonl"], max_context=64)
    found = contexts(task)
    assert found[0] == "Bo walks to the room of Bo. Cy walks to the room of Cy."
    assert found[1] == "Cy walks to the room of Cy. Di walks to the room of Di."
    asked = questions(task)[0]
    assert sum("Where is" in text for text in asked) == 2
    assert not any("Who walks?" in text for text in asked)


def test_text_asks_for_its_own_words(tokenizer: str, data: Path) -> None:
    """Every gap and every continuation is in the text, where the question says."""
    task = qa(tokenizer, data, {"book.txt": 1}, max_context=200, max_query=150, answer_length=64)
    seen = 0
    for text, asked in zip(contexts(task), questions(task), strict=True):
        words = " ".join(text.split())
        for line in asked:
            question, answer = re.fullmatch(
                r"\nQuestion: (.*)\nAnswer: (.*)\[END\]", line.replace(task.tokenizer.eos_token, "[END]")
            ).groups()  # type: ignore[union-attr]
            quoted = re.fullmatch(r'Which words follow "(.*)"\?', question)
            wanted = f"{quoted[1]} {answer}" if quoted else question.replace("___", answer)
            assert re.sub(r"\W", "", wanted) in re.sub(r"\W", "", words)
            seen += 1
    assert seen > 4


def test_what_test_files_hold_is_left_out(tokenizer: str, data: Path) -> None:
    """By eight words in a row, or by the title; both are counted."""
    rows = [{"id": "gulls#3", "context": "Fine.", "qas": [{"question": "How?", "answers": ["Fine"]}]}]
    rows += [{"context": "Held out.", "qas": [{"question": "What?", "answers": ["Held"]}]}]
    rows += [{"context": f"One day {HIDDEN} again.", "qas": [{"question": "Which?", "answers": ["grey"]}]}]
    rows += [{"context": f"Kept {i}.", "qas": [{"question": "What?", "answers": ["Kept"]}]} for i in range(3)]
    (data / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data / "other.jsonl").write_text(
        json.dumps({"title": "Gulls", "context": "No.", "question": "q", "answers": ["No"]})
    )
    task = qa(tokenizer, data, {"more.jsonl": 1}, decontaminate=["test.jsonl", "other.jsonl"])
    assert contexts(task) == ["Kept 0.", "Kept 1.", "Kept 2."]
    assert "1 paragraphs of more.jsonl" in task.notes("train")[0]
    assert any("1 of 4 contexts are left out" in note for note in task.notes("train"))


def test_a_template_is_asked_no_more_than_so_often(tokenizer: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradmem.data.paragraphs.MAX_REPEATS", 5)
    task = qa(tokenizer, data, {"train.jsonl": 1})
    times = Counter(line for asked in questions(task) for line in asked if "Who is it?" in line)
    assert sum(times.values()) == 5


def test_entries_have_their_shares_and_batches_one_length(tokenizer: str, data: Path) -> None:
    """A batch depends on its arguments alone; each entry goes round; contexts of about a length stand together."""
    shares = {"train.jsonl": 1.0, "book.txt": 3.0}
    task, again = (
        qa(tokenizer, data, shares, max_context=100, max_query=150, questions=2, answer_length=64) for _ in range(2)
    )
    later = again.batch("train", 512, 16, seed=1)
    batches = [task.batch("train", at, 16, seed=1) for at in range(0, 1024, 16)]
    assert torch.equal(batches[32].queries.ids, later.queries.ids)
    assert max(torch.bincount(batch.rows).max() for batch in batches) == 2
    texts = [
        task.text(ids[mask].tolist()) for b in batches for ids, mask in zip(b.context.ids, b.context.mask, strict=True)
    ]
    rain = [text for text in texts if "rains" in text]
    assert 0.22 < len(rain) / len(texts) < 0.28
    assert Counter(rain).keys() == set(contexts(task)), "every paragraph comes"
    assert max(Counter(rain).values()) - min(Counter(rain).values()) <= 1
    waste = [1 - float(batch.context.mask.float().mean()) for batch in batches]
    assert sum(waste) / len(waste) < 0.1


def test_one_file_is_asked_as_it_is(tokenizer: str, data: Path) -> None:
    task = qa(tokenizer, data / "train.jsonl", {})
    assert task.size("test") == len(NAMES)
    with pytest.raises(GradmemError, match="`data`, a directory, and `mix`"):
        task.batch("train", 0, 1)


@pytest.mark.parametrize("mix", [["train.jsonl"], {"train.jsonl": 0}, {"train.jsonl": "much"}])
def test_a_mix_is_patterns_with_shares(tokenizer: str, mix: Any) -> None:
    with pytest.raises(GradmemError, match="mix must be patterns of files"):
        qa(tokenizer, None, mix)


def test_files_that_are_not_there_are_named(tokenizer: str, data: Path) -> None:
    with pytest.raises(GradmemError, match=r"no file in .* matches the pattern absent\*"):
        qa(tokenizer, data, {"absent*": 1}).batch("train", 0, 1)


@needs("squad_subset", "qa")
def test_real_files_share_nothing_with_the_dev_file(tokenizer: str, data: Path) -> None:
    """Sentences of Wikipedia, some of which SQuAD has too: runs of words are counted in another way here."""
    lines = (DATA / "qa/qamr/qamr-test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [{**row, "qas": row["qas"][:1]} for row in map(json.loads, lines)]
    (data / "qamr.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data / "dev.jsonl").symlink_to(DATA / "squad_subset/dev.jsonl")
    options = {"merge": ["qamr.jsonl"], "max_context": 900, "max_query": 200}
    task = qa(tokenizer, data, {"qamr.jsonl": 1}, decontaminate=["dev.jsonl"], **options)

    def runs(text: str) -> set[str]:
        words = re.sub(r"[^a-z0-9_ ]", "", re.sub(r"\W+", " ", text.lower())).split()
        return {" ".join(words[i : i + 8]) for i in range(len(words) - 7)}

    held = set().union(*(runs(text) for text in {row[0] for row in read_rows(data / "dev.jsonl")}))
    every = qa(tokenizer, data, {"qamr.jsonl": 1}, **options)
    assert any(runs(text) & held for text in contexts(every))
    assert not any(runs(text) & held for text in contexts(task))


def test_calibration_keeps_what_it_measures_on_apart(tokenizer: str, data: Path) -> None:
    """Four fifths to fit on, the rest to measure on: of one file, or of the validation split; each asks others' too."""
    one = qa(tokenizer, data / "train.jsonl", {})
    assert (one.calibration_size("valid"), one.calibration_size("test")) == (12, 4)
    found: dict[Any, set[str]] = {}
    for split in ("valid", "test"):
        batches = one.calibration(split, 0, one.calibration_size(split) or 0)
        own, other = batches["written here"], batches["of another context"]
        found[split] = {
            one.text(ids[mask].tolist()) for ids, mask in zip(own.context.ids, own.context.mask, strict=True)
        }
        assert bool((own.rows != other.rows).all())
        assert torch.equal(own.labels, other.labels)
    assert not found["valid"] & found["test"]
    assert len(found["valid"] | found["test"]) == len(NAMES)
    held = qa(tokenizer, data, {"train.jsonl": 1})
    assert held.calibration_size("valid") + held.calibration_size("test") == held.size("valid")


def test_answers_are_right_as_squad_compares_them(tokenizer: str) -> None:
    task = qa(tokenizer, None, {})
    assert task.right("the Room of Ada.", "room of Bo", ["room of Bo", "room of Ada"])
    assert not task.right("room of Cy", "room of Bo", ["room of Bo", "room of Ada"])


def test_a_reader_of_questions_is_calibrated_on_one_file(
    tokenizer: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the command line to a checkpoint that abstains; the weights know nothing, so what is right is made up."""
    torch.manual_seed(0)
    spec = {"name": "qa", "tokenizer": tokenizer, "answer_length": 3}
    model = MemoryModel.from_spec(spec, TINY_LLAMA, {"name": "compact", "writers": "select", "budget": 0.2})
    model.save_pretrained(tmp_path / "reader")
    monkeypatch.setattr(QA, "right", lambda self, answer, wanted, references: wanted.startswith("room"))
    file = str(data / "train.jsonl")
    assert main(["calibrate", str(tmp_path / "reader"), "--data", file, "--json", str(tmp_path / "found.json")]) == 0
    (row,) = json.loads((tmp_path / "found.json").read_text())
    assert row["samples"] == 4
    assert 0 <= row["auroc"]["of another context"]["all"] <= 1
    assert row["exact_match"] == pytest.approx(1 / 3)
    loaded = gradmem.load(tmp_path / "reader")
    assert loaded.abstain is not None
    assert "data" not in loaded.abstain.fitted["task"]
    assert loaded.write("Ada walks to the room of Ada. It rains there.").answer("Who walks?").written is not None
