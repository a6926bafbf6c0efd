"""Memories of texts in chunks: their files, receipts, what is appended, what is refused, and training on them."""

from __future__ import annotations

import dataclasses
import json
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import gradmem
from gradmem import GradmemError, Memory, MemoryModel
from gradmem.batch import Tokens
from gradmem.cli.main import main
from gradmem.cli.training import plan, train
from gradmem.evaluation import evaluate
from gradmem.methods import RMT, MeanPool
from gradmem.model.writing import answer_losses
from gradmem.receipts import Receipt
from helpers import MODES, SIZE, chunked, distance, make_gradmem, make_method, random_tokens, tiny_model
from recipes import recipe

# --- Models, files, receipts ------------------------------------------------------------------------------

PAIRS = [f"{chr(97 + i)}{i}:{i}{chr(65 + i)}" for i in range(8)]
TEXT, MORE, LAST = "\n".join(PAIRS[:4]), "\n".join(PAIRS[4:7]), PAIRS[7]
QUERIES = ["a0", "f5", "h7"]


@pytest.fixture(params=MODES)
def model(request: pytest.FixtureRequest) -> MemoryModel:
    """A model trained on whole contexts that is to write two pairs at a time."""
    made = tiny_model(0)
    made.configure({"chunk_size": 15, "chunk_mode": request.param})
    return made


def logits(model: MemoryModel, memory: Memory) -> Tensor:
    queries = Tokens.from_lists([model.task.encode(model.task.query_text(query)) for query in QUERIES])
    with torch.no_grad():
        return model.method.read(memory, queries, torch.zeros(len(QUERIES), dtype=torch.long))


def test_a_file_of_chunks(model: MemoryModel, tmp_path: Path) -> None:
    """Any copy of the checkpoint reads it, however it would write itself."""
    memory = model.write([TEXT, LAST])
    assert [receipt.chunks for receipt in memory.receipts] == [[14, 15], [8]]
    assert [receipt.context_tokens for receipt in memory.receipts] == [29, 8]
    assert [receipt.steps for receipt in memory.receipts] == [2, 2]
    plain = tiny_model(0)
    opened = plain.open(memory.save(tmp_path / "m"))
    assert opened.receipts == memory.receipts
    assert opened.ask([QUERIES, QUERIES]) == memory.ask([QUERIES, QUERIES])
    if model.method.chunk_mode == "independent":
        assert opened.restore() == memory.restore()
        assert [len(ids) for ids in opened.reconstruct()] == [29, 8]
    else:
        with pytest.raises(GradmemError, match="3 chunks in the vectors of 2"):
            opened.restore()
        assert [len(ids) for ids in opened[1].reconstruct()] == [8]


def test_append(model: MemoryModel, tmp_path: Path) -> None:
    """What is appended is the next chunk: the same as when all chunks are written at once, one by one where joint."""
    first = model.write("\n".join(PAIRS[:2]))
    before = {name: tensor.clone() for name, tensor in first.tensors.items()}
    second = model.append(first, "\n".join(PAIRS[2:4]), may_forget=True)
    assert all(torch.equal(first.tensors[name], tensor) for name, tensor in before.items())
    ids = [model.task.encode(model.task.context_text("\n".join(PAIRS[i : i + 2]))) for i in (0, 2)]
    model.task.may_end = lambda tokens: tokens == model.task.encode("|")[0]
    if model.method.chunk_mode == "joint":
        model.method.chunk_by(15, "sequential")
    with torch.no_grad():
        wanted = model.method.write(Tokens.from_lists([list(chain(*ids))])).memory
    for name, tensor in wanted.tensors.items():
        assert distance(second.tensors[name].double(), tensor.double()) < 1e-5
    opened = model.open(second.save(tmp_path / "m"))
    assert opened.ask(QUERIES) == second.ask(QUERIES)
    assert opened.receipts == second.receipts


def test_append_to_several(model: MemoryModel) -> None:
    """Each row gets its own text, whatever was there before."""
    rows = model.append(model.write([TEXT, LAST]), [LAST, MORE], may_forget=True)
    for row, (text, more) in enumerate([(TEXT, LAST), (LAST, MORE)]):
        alone = model.append(model.write(text), more, may_forget=True)
        assert distance(logits(model, rows[row]), logits(model, alone)) < 1e-4
        assert rows.receipts[row].losses == pytest.approx(alone.receipts[0].losses, abs=1e-4)


def test_receipts_of_appended_texts(model: MemoryModel, tmp_path: Path) -> None:
    first = model.write(TEXT)
    second = model.append(first, MORE, may_forget=True)
    third = model.append(second, LAST, may_forget=True)
    (receipt,) = third.receipts
    assert [part.context_tokens for part in receipt.history] == [29, 22, 8]
    # Vectors of their own keep their losses, but READ sees more of them now; of the same vectors nobody knows.
    since = {"answers": None, "measured": model.method.chunk_mode == "independent", "earlier": []}
    assert receipt.earlier == [dataclasses.replace(one.receipts[0], **since) for one in (first, second)]
    assert (receipt.measured, len(receipt.answers)) == (True, 1)
    own = model.write(LAST).receipts[0]
    assert receipt.context_sha256 == own.context_sha256
    again = model.append(second, LAST, before=TEXT + MORE, may_forget=True)
    measured = again.receipts[0]
    assert measured.token_losses == receipt.token_losses
    for part, text in zip(measured.earlier, (TEXT, MORE), strict=True):
        context = Tokens.from_lists([model.task.encode(model.task.context_text(text))])
        known = next(one for one in receipt.earlier if one.context_sha256 == part.context_sha256)
        assert part.losses[:-1] == known.losses[:-1]
        assert part.measured
        assert part.answers == answer_losses(model.method, model.task, again, [text])[0]
        if model.method.chunk_mode == "independent":
            assert dataclasses.replace(part, answers=None) == known
        else:
            with torch.no_grad():
                wanted = model.method.token_losses(third, context)[0].tolist()
            assert part.token_losses == pytest.approx(wanted, abs=1e-3)
            assert part.losses[-1] == pytest.approx(sum(wanted) / len(wanted), abs=1e-5)
            assert part.token_losses != known.token_losses
    shown = json.loads(json.dumps(receipt.to_dict()))["earlier"][0]
    kept = first.receipts[0].lost if model.method.chunk_mode == "independent" else None
    assert (shown["lost"], shown["at_risk"]) == (kept, None)
    with pytest.raises(GradmemError, match="`before` is not the text"):
        model.append(second, LAST, before=MORE + TEXT, may_forget=True)
    assert Memory.load(third.save(tmp_path / "m")).receipts == third.receipts


def test_an_appended_text_is_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In vectors of its own, beside what was there."""
    model = tiny_model(0)
    model.save_pretrained(tmp_path / "checkpoint")
    model = gradmem.load(tmp_path / "checkpoint", {"chunk_size": 15, "chunk_mode": "independent"})
    memory = model.append(model.write(TEXT), MORE, may_forget=True)
    ids = memory.reconstruct()
    assert ids[0] == model.write(TEXT).reconstruct()[0]
    assert ids[1] == model.write(MORE).reconstruct()[0]
    memory.save(tmp_path / "m")
    (tmp_path / "both.txt").write_text(TEXT + MORE)
    assert main(["inspect", f"{tmp_path}/m", "--context", f"{tmp_path}/both.txt"]) == 0
    assert "29 tokens in 2 chunks" in capsys.readouterr().out
    assert main(["restore", f"{tmp_path}/m", "--context", f"{tmp_path}/both.txt"]) == 0
    assert "of 51" in capsys.readouterr().err


def test_records_of_version_1() -> None:
    """As they were written before there were chunks."""
    data = dataclasses.asdict(tiny_model(0).write(LAST).receipts[0])
    old = Receipt.read({name: value for name, value in data.items() if name not in ("chunks", "earlier")})
    assert (old.chunks, old.earlier, old.history) == ([], [], [old])


def test_long_memories_leave_less_room() -> None:
    """Appending stops where READ would have no positions left for a query."""
    model = tiny_model(0)
    model.configure({"chunk_mode": "independent"})
    model.method.backbone.model.config.max_position_embeddings = 60
    memory = model.write(LAST)
    while len(memory.receipts[0].history) < model.method.max_chunks:
        memory = model.append(memory, LAST, may_forget=True)
    assert memory.ask("h7", max_new_tokens=20) is not None
    with pytest.raises(GradmemError, match=r"the query has 5 tokens; the limit of 'unnamed' is 3"):
        memory.ask("h7", max_new_tokens=60 - 8 * model.method.max_chunks - 3)
    with pytest.raises(GradmemError, match=f"the limit is {model.method.max_chunks}: raise `chunk_size`"):
        model.append(memory, LAST, may_forget=True)


# --- Refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"chunk_size": 0}, {"chunk_size": 38}, {"chunk_size": "x"}, {"chunk_mode": "both"}], ids=str
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(GradmemError, match=f"{next(iter(options))} must be"):
        make_gradmem(**options)
    with pytest.raises(GradmemError, match="must be"):
        make_gradmem().chunk_by(**{"chunk_size": None} | options)


def test_too_many_chunks_are_refused() -> None:
    method = chunked("independent")
    assert method.max_context == 6 * SIZE
    assert method.max_query == 40 - 6 * 3
    method.write(random_tokens([6 * SIZE]))
    method.task = SimpleNamespace(may_end=lambda ids: torch.arange(ids.shape[1]).expand_as(ids) % 2 == 1)
    with pytest.raises(GradmemError, match="a context has 9 chunks; the limit is 6"):
        method.write(random_tokens([6 * SIZE]))
    method.chunk_by(SIZE, "sequential")
    assert method.write(random_tokens([60])).memory.tensors["memory"].isfinite().all()
    with pytest.raises(GradmemError, match="write them in chunks"):
        make_gradmem().write(random_tokens([38]))


def test_what_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model(0)
    with pytest.raises(GradmemError, match="has a method of its own"):
        model.configure({"n_mem": 3})
    with pytest.raises(GradmemError, match="2 texts for 1 memories"):
        model.append(model.write(TEXT), [MORE, LAST], may_forget=True)
    with pytest.raises(GradmemError, match="not by"):
        model.append(tiny_model(1).write(TEXT), MORE)
    pool = MemoryModel.from_spec(model.spec["task"], model.spec["backbone"], {"name": "mean_pool"})
    with pytest.raises(GradmemError, match="cannot write several chunks"):
        pool.configure({"chunk_size": 4})
    with pytest.raises(GradmemError, match="cannot append"):
        pool.append(pool.write(TEXT), MORE)
    with pytest.raises(GradmemError, match="chunk_mode must be sequential or independent, not 'joint'"):
        make_method(RMT, chunk_size=4, chunk_mode="joint")
    with pytest.raises(GradmemError, match="writes a context whole: write all text at once"):
        make_method(MeanPool).chunk_by(3)
    apart = model.write(TEXT)
    model.configure({"chunk_size": 15, "chunk_mode": "independent"})
    apart = model.append(apart, MORE, may_forget=True)
    model.configure({"chunk_mode": "sequential"})
    with pytest.raises(GradmemError, match="has vectors of its own: append with"):
        model.append(apart, LAST, may_forget=True)
    bad = {**apart.tensors, "lengths": apart.tensors["lengths"] + 1}
    with pytest.raises(GradmemError, match="chunks a row"):
        model.method.check(Memory(bad), "it")


# --- Training, evaluation, command line -------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_training(mode: str, tmp_path: Path) -> None:
    """Planned, trained for two steps, saved with its chunks, measured on longer contexts than in training."""
    made = recipe(2, strategy="auto", micro_batch_size=0)
    made.task["pairs"] = 4
    made.method |= {"chunk_size": 10, "chunk_mode": mode}
    assert plan(made)
    train(made, tmp_path / "run")
    model = gradmem.load(tmp_path / "run" / "checkpoint")
    assert (model.method.chunk_size, model.method.chunk_mode) == (10, mode)
    (result,) = evaluate(model, [2], samples=3, task={"pairs": 6, "alphabet": 12})
    assert result.n_mem == (8 if mode == "independent" else 2)
    assert result.metrics == {}
    memory = model.write("a:b\nc:d\ne:f")
    assert memory.receipts[0].chunks == [10, 6]
    assert memory.ask("a") is not None


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model(0).save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "t.txt").write_text(TEXT)
    write = ["write", f"{tmp_path}/checkpoint", f"{tmp_path}/t.txt", "-o", f"{tmp_path}/m"]
    assert main([*write, "--chunk_size", "15", "--chunk_mode=independent"]) == 0
    assert Memory.load(tmp_path / "m").tensors["memory"].shape == (1, 2, 8, 16)
    assert main(["ask", f"{tmp_path}/m", "a0"]) == 0
    assert main([*write, "--chunk_size=15"]) == 0
    opened = Memory.load(tmp_path / "m")
    assert opened.tensors["memory"].shape == (1, 8, 16)
    assert opened.receipts[0].chunks == [14, 15]
    capsys.readouterr()
    measure = ["eval", f"{tmp_path}/checkpoint", "--pairs=6", "--samples=2", "--json", f"{tmp_path}/e.json"]
    assert main([*measure, "--method.chunk_size", "15", "--method.chunk_mode", "independent"]) == 0
    (row,) = json.loads((tmp_path / "e.json").read_text())
    assert (row["method.chunk_size"], row["method.chunk_mode"], row["n_mem"]) == (15, "independent", 24)
    for wrong in (["--method.chunk_size", "0"], ["--method.n_mem", "3"], ["--method.chunk_size", "lots"]):
        assert main([*measure, *wrong]) == 2
    assert "Traceback" not in capsys.readouterr().err
