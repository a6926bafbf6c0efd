"""Documents whose chunks change: joined, replaced and forgotten, and the receipts of that."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax

import gradmem
from chat_models import save_model
from gradmem import GradmemError, Memory, MemoryModel
from gradmem.batch import Tokens
from gradmem.cli.main import main
from gradmem.compaction.questions import STOCK

PARTS = ["Ann signed the paper.\n", "The code is 4711.\n", "It rained all day.\n"]
QUERY = "What is the code?"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    model = made(folder)
    model.write(PARTS).save(folder / "m")
    for number, part in enumerate(PARTS):
        model.write(part).save(folder / f"m{number}", "float16")
    (folder / "new.txt").write_text("The code is 1234.\n")
    return folder


@pytest.fixture
def place(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(folder: Path, **options: Any) -> MemoryModel:
    return gradmem.load(save_model(folder / "lm"), {"name": "compact", "writers": "select", "budget": 0.5, **options})


def run(capsys: pytest.CaptureFixture[str], *line: str) -> dict[str, Any]:
    """What a command says as JSON."""
    capsys.readouterr()
    assert main([*line, "-o", "out", "--json", "--query", QUERY]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    return told


def same(one: Memory, other: Memory) -> bool:
    return one.receipts == other.receipts and all(torch.equal(one.tensors[n], other.tensors[n]) for n in one.tensors)


def probability(memory: gradmem.BoundMemory, answer: str) -> float:
    """Geometric mean of the probabilities of an answer's tokens, with its end, by the method alone."""
    task, method = memory.model.task, memory.model.method
    query, ids = task.encode_query(QUERY), [*task.encode(answer), task.end_id]
    joined = method.together(memory) if len(memory) > 1 else memory
    with torch.no_grad():
        logits = method.read(joined, Tokens.from_lists([query + ids]))[0, len(query) : -1]
    chosen = log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None])
    return float(chosen.mean().exp())


def test_forget(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = run(capsys, "forget", "m", "2")
    before, after = gradmem.open("m"), gradmem.open("out")
    assert same(after, before.select([0, 2]))
    assert same(after, before.model.write([PARTS[0], PARTS[2]])), "nothing of the chunk is left"
    assert [one["bytes"] for one in told["chunks"]] == ["same", "forgotten", "same"]
    gone, others = told["answers"]
    assert (gone["of"], others["of"]) == ("forgotten chunk 2", "other chunks")
    assert gone["answer"] == before[1].ask(QUERY, max_new_tokens=24)
    assert others["answer"] == after.ask(QUERY, max_new_tokens=24)
    nothing = before.model.bind(before.model.write("x", 0))
    for one in (gone, others):
        wanted = [probability(memory, one["answer"]) for memory in (before, after, nothing)]
        assert [one["before"], one["after"], one["unwritten"]] == pytest.approx(wanted, abs=2e-4)
    assert gone["before"] != gone["after"]


def test_replace(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = run(capsys, "replace", "m", "2", "new.txt")
    before, after = gradmem.open("m"), gradmem.open("out")
    assert same(after, before.model.write([PARTS[0], "The code is 1234.\n", PARTS[2]]))
    assert [one["bytes"] for one in told["chunks"]] == ["same", "changed", "same"]
    new, others = told["answers"]
    assert new["answer"] == after[1].ask(QUERY, max_new_tokens=24)
    assert others["answer"] == before.model.forget(before, 1).ask(QUERY, max_new_tokens=24)
    for one in (new, others):
        wanted = [probability(memory, one["answer"]) for memory in (before, after)]
        assert [one["before"], one["after"]] == pytest.approx(wanted, abs=2e-4)


def test_replace_takes_as_many_steps_as_the_chunk_has(tmp_path: Path) -> None:
    model = made(tmp_path, writers="select,match")
    memory = model.write(PARTS[:2], 1)
    assert model.replace(memory, 0, PARTS[2]).receipts[0].steps == 1


def test_join(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = run(capsys, "join", "m0", "m2", "m1")
    joined = gradmem.open("out")
    parts = [Memory.load(f"m{number}") for number in (0, 2, 1)]
    assert all(same(joined[row], part) for row, part in enumerate(parts)), "in their own precision"
    assert [one["chunk"] for one in told["chunks"]] == ["m0, chunk 1", "m2, chunk 1", "m1, chunk 1"]
    assert {one["bytes"] for one in told["chunks"]} == {"same"}
    for one, name in zip(told["answers"], ("m0", "m2", "m1"), strict=True):
        alone = gradmem.open(name)
        assert (one["of"], one["answer"]) == (name, alone.ask(QUERY, max_new_tokens=24))
        wanted = [probability(memory, one["answer"]) for memory in (alone, joined)]
        assert [one["before"], one["after"]] == pytest.approx(wanted, abs=2e-4)


def test_tables(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Questions that fit any text, if no others are given."""
    assert main(["forget", "m", "3", "-o", "out"]) == 0
    told = capsys.readouterr().out
    assert all(question in told for question in STOCK)
    assert "forgotten chunk 3" in told
    assert f"saved out: {Path('out').stat().st_size} bytes" in told


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["forget", "m", "4"], "there is no chunk 4: the memory has chunks 1 to 3"),
        (["forget", "m", "0"], "there is no chunk 0"),
        (["forget", "m0", "1"], "the memory has one chunk, and without it nothing is left"),
        (["replace", "m0", "2", "new.txt"], "there is no chunk 2: the memory has one chunk, number 1"),
        (["replace", "m", "1", "empty.txt"], "the context is empty"),
        (["replace", "m", "1", "none.txt"], "cannot read none.txt"),
        (["join", "m0", "larger"], "the memories were written with different options"),
        (["join", "m0", "foreign"], "was written by the checkpoint"),
        (["join", "crammed", "crammed"], "cram, which does not read several chunks together"),
        (["join", "m0", "crammed"], "does not read several chunks together"),
        (["join", "m0", "none"], "no memory file at none"),
        (["forget", "stored", "1"], "a stored memory becomes one by gradmem store export"),
    ],
)
def test_bad_input(place: Path, line: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "larger" in line:
        made(place, budget=0.7).write("b").save("larger")
    if "foreign" in line:
        foreign = made(place / "other")
        foreign.method.backbone.model.model.norm.weight.data += 1
        foreign.write("b").save("foreign")
    if "crammed" in line:
        gradmem.load(str(place / "lm"), {"name": "cram", "write_steps": 1}).write("b").save("crammed")
    Path("empty.txt").write_text("")
    capsys.readouterr()
    assert main([*line, "-o", "out"]) == 2
    (told,) = capsys.readouterr().err.strip().splitlines()
    assert message in told
    assert not Path("out").exists()


def test_nothing_to_join(tmp_path: Path) -> None:
    with pytest.raises(GradmemError, match="no memory to join"):
        made(tmp_path).join([])
