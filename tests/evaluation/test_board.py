"""The board: its scores against the language model itself, and its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import gradmem
from chat_models import save_model
from gradmem import GradmemError
from gradmem.evaluation import board
from gradmem.evaluation.board_figure import board_figure
from gradmem.evaluation.board_rows import Outcome, rows_of
from gradmem.methods.vectors import VectorsOptions
from gradmem.model import MemoryModel

TEXTS = [
    ("Ann lives in Oslo.", [("Who?", ["Ann"]), ("Where does she live?", ["Oslo", "in Oslo"])]),
    ("The code is 4711.", [("What is the code?", ["4711"])]),
    ("Bo paid ten euros.", [("How much?", ["ten euros", "ten"])]),
]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MemoryModel:
    monkeypatch.setattr(board, "ALONG", 4)
    found = gradmem.load(save_model(tmp_path / "lm"), {"name": "full_context"})
    found.task.answer_length = 6
    return found


def measured(model: MemoryModel, **options: Any) -> board.Measured:
    given: dict[str, Any] = {"writers": ["select", "match", "compact"], "budgets": [1.0, 0.25]} | options
    return board.measure(model, TEXTS, **given)


def test_fidelity_is_that_of_the_language_model(model: MemoryModel) -> None:
    """KL and agreement of no text and of another text, by plain passes over whole prompts."""
    found = measured(model, writers=["full"])
    plain = AutoModelForCausalLM.from_pretrained(model.name)
    texts, before = found.answers["texts"], found.answers["before"]

    def scores(place: int, ids: list[int]) -> tuple[float, float]:
        asked, starts = texts[place]["questions"], (texts[place]["ids"], ids)
        whole, other = (torch.cat([logprobs(start + one["query"], one["along"]) for one in asked]) for start in starts)
        same = whole.argmax(-1) == other.argmax(-1)
        return float((whole.exp() * (whole - other)).sum(-1).mean()), float(same.double().mean())

    def logprobs(prompt: list[int], answer: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits = plain(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1)

    rows = {row["writer"]: row for row in found.rows}
    for name, start in (("none", lambda place: before), ("swapped", lambda place: texts[place - 1]["ids"])):
        wanted = [scores(place, start(place)) for place in range(len(TEXTS))]
        divergence, agreement = torch.tensor(wanted, dtype=torch.double).mean(0).tolist()
        assert rows[name]["kl"] == pytest.approx(divergence, abs=1e-5)
        assert rows[name]["agreement"] == pytest.approx(agreement)
    assert rows["swapped"]["gap_closed"] == pytest.approx(1 - rows["swapped"]["kl"] / rows["none"]["kl"])
    assert rows["full"]["kl"] == pytest.approx(0, abs=1e-6)


def test_vectors_are_measured_beside_the_others(model: MemoryModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VectorsOptions.__init__.__kwdefaults__, "write_steps", 1)
    rows = {row["writer"]: row for row in measured(model, writers=["vectors"], budgets=[0.5]).rows}
    assert list(rows) == ["full", "none", "swapped", "vectors"]
    width = model.method.backbone.width
    assert rows["vectors"]["bytes"] == rows["swapped"]["bytes"] == 4 * VectorsOptions().n_mem * width
    for name in ("swapped", "vectors"):
        assert rows[name]["budget"] == pytest.approx(rows[name]["bytes"] / rows["full"]["bytes"], abs=1e-4)
    assert rows["vectors"]["kl"] != rows["swapped"]["kl"]


def test_rows_of_all_writers(model: MemoryModel) -> None:
    found = measured(model)
    by = {(row["writer"], row["budget"]): row for row in found.rows}
    asked = [(name, budget) for name in ("swapped", "select", "match", "compact") for budget in (1.0, 0.25)]
    assert list(by) == [("full", 1.0), ("none", 0.0), *asked]
    full, none = by["full", 1.0], by["none", 0.0]
    # The whole cache, and all of its entries selected, answer alike.
    for row in (full, by["select", 1.0]):
        assert (row["gap_closed"], row["agreement"], row["f1_full"]) == pytest.approx((1, 1, 1), abs=1e-4)
    assert (none["gap_closed"], none["break_even"], by["swapped", 0.25]["break_even"]) == (0, None, None)
    assert by["select", 0.25]["kl"] > by["select", 1.0]["kl"]
    assert by["select", 0.25]["bytes"] < full["bytes"] / 2
    assert by["match", 0.25]["write_seconds"] > by["select", 0.25]["write_seconds"] > 0
    assert {**by["compact", 0.25], "writer": "match"} == by["match", 0.25]
    assert {row["questions"] for row in found.rows} == {4}
    for row in found.rows:
        for score in ("exact_match", "f1", "f1_full", "kl", "agreement", "gap_closed"):
            low, high = row[f"{score}_ci95"]
            assert low - 1e-9 <= row[score] <= high + 1e-9
    first = found.answers["texts"][0]["questions"][1]
    assert first["references"] == ["Oslo", "in Oslo"]
    assert set(first["answers"]) == {f"{writer} {budget:g}" for writer, budget in by}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"writers": ["slect"]}, "unknown writer 'slect': did you mean 'select'"),
        ({"budgets": [1.5]}, "a budget must be a fraction"),
        ({"budgets": [0.0]}, "a budget must be a fraction"),
        ({"budgets": []}, "budgets must be at least one number"),
        ({"texts": TEXTS[:1]}, "at least 2 texts"),
    ],
)
def test_bad_options(model: MemoryModel, options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"texts": TEXTS, "writers": ["full"], "budgets": [0.5]} | options
    with pytest.raises(GradmemError, match=message):
        board.measure(model, **given)


def outcome(kl: float, **more: Any) -> Outcome:
    given: dict[str, Any] = {"agreement": 0.5, "bytes": 10, "write_seconds": 4.0, "query_seconds": 1.0} | more
    return Outcome.of(["a b"], [["a b", "c"]], ["b"], kl=kl, **given)


def test_break_even_and_the_gap_by_hand() -> None:
    """Reading the text and a question takes 3 s together, and a question to a memory 1 s: after two it has paid."""
    full = [outcome(0.0, write_seconds=2.0)] * 2
    slow = [outcome(0.5, query_seconds=None), outcome(1.0, query_seconds=3.5)]
    given = {
        ("full", 1.0): full,
        ("none", 0.0): [outcome(2.0), outcome(4.0)],
        ("a", 0.1): [outcome(1.0)] * 2,
        ("b", 0.1): slow,
    }
    full_row, none, row, never = rows_of(given, {"seed": 3})
    assert (row["break_even"], never["break_even"], full_row["break_even"]) == (2, None, 1)
    assert row["gap_closed"] == pytest.approx(1 - 1.0 / 3.0)
    assert row["gap_closed_ci95"] == pytest.approx((0.5, 0.75))
    assert (never["query_ms"], none["gap_closed"], row["exact_match"]) == (3500, 0, 1)
    assert row["f1_full"] == 1.0  # "a" is an article
    assert row["seed"] == 3


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    given = {
        ("full", 1.0): [outcome(0.0)] * 2,
        ("none", 0.0): [outcome(2.0)] * 2,
        ("a", 0.1): [outcome(1.0, bytes=3)] * 2,
    }
    file = board_figure(rows_of(given, {}), tmp_path / "board.png", "a title")
    assert file.read_bytes().startswith(b"\x89PNG")
