"""What speaks for an answer, against slow references; when to abstain, against closed forms; and the commands."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import gradmem
from gradmem import Answer, GradmemError, MemoryModel
from gradmem.batch import Tokens
from gradmem.cli import main
from gradmem.evaluation.calibrate import WRITTEN, Calibration, _auroc, calibrate
from gradmem.specs import build_task
from gradmem.trust import Abstain, balanced, claim_losses
from test_methods import ALL, TEXT, build


@pytest.mark.parametrize("case", ALL, ids=lambda pair: f"{pair[0]}-{pair[1]}")
def test_log_probabilities_are_those_of_reading_token_by_token(case: tuple[str, int]) -> None:
    """Queries about two memories at once, with answers of different lengths."""
    model = build(*case)
    memory, task = model.write([TEXT, "11:22"]), model.task
    lengths = set()
    for row, found in enumerate(memory.answer([["a7", "zz"], ["11", "a7"]], max_new_tokens=6)):
        for query, answer in zip([["a7", "zz"], ["11", "a7"]][row], found, strict=True):
            ids, logprobs, margins = task.encode(task.query_text(query)), [], []
            with torch.no_grad():
                while len(logprobs) < 6 and not (logprobs and ids[-1] == task.end_id):
                    scores = model.method.read(memory[row], Tokens.from_lists([ids]))[0, -1].log_softmax(-1)
                    best = scores.topk(2)
                    logprobs.append(float(best.values[0]))
                    margins.append(float(best.values[0] - best.values[1]))
                    ids.append(int(best.indices[0]))
            lengths.add(len(logprobs))
            assert answer.text == memory[row].ask(query, max_new_tokens=6)
            assert answer.logprob == pytest.approx(np.mean(logprobs), abs=1e-3)
            assert answer.lowest == pytest.approx(min(logprobs), abs=1e-3)
            assert answer.margin == pytest.approx(margins[0], abs=1e-3)


def test_near_loss_is_the_receipt_of_the_pair_alone(tiny: MemoryModel) -> None:
    """Read as WRITE reads it: the pair as the only context of this memory."""
    memory = tiny.write(TEXT)
    answer = memory.answer("a7")
    claim = f"!a7:{answer.text}!"
    with torch.no_grad():
        losses = tiny.method.token_losses(memory, Tokens.from_lists([tiny.task.encode(claim)]))
    assert answer.near_loss == pytest.approx(float(losses.mean()), abs=1e-4)


def test_near_loss_is_that_of_the_chunk_that_says_it(tiny: MemoryModel) -> None:
    tiny.choose({"chunk": 15, "chunks": "independent"})
    memory = tiny.write(["a0:bc\nd1:ef\ng2:hi", "a0:bc"])
    texts = ["!a0:bc!", "!g2:hi!"]
    claims = [tiny.task.encode(text) for text in texts]
    rows = tiny.method.apart(memory)
    assert len(rows) == 3
    every = [claim_losses(tiny.method, rows, [claim] * 3) for claim in claims]
    found = [claim_losses(tiny.method, memory, [claim] * 2) for claim in claims]
    assert found == [pytest.approx([min(first, second), alone]) for first, second, alone in every]


def test_several_answers_to_a_query_are_refused(tiny: MemoryModel) -> None:
    with pytest.raises(GradmemError, match="one for each query"):
        tiny.write(TEXT).answer("a7", num_beams=2)


def random_answers(count: int, seed: int = 0) -> list[Answer]:
    draw = np.random.default_rng(seed)
    return [
        Answer(
            "", float(-draw.exponential()), float(-draw.exponential(2)), float(draw.exponential()), float(draw.random())
        )
        for _ in range(count)
    ]


def test_a_fit_finds_the_regression_that_made_the_data() -> None:
    """Classes drawn by a logistic rule of the margin, some of them thrown away: either class weighs one half."""
    answers = random_answers(20_000)
    draw = np.random.default_rng(1)
    margins = np.array([answer.margin for answer in answers])
    written = draw.random(len(answers)) < 1 / (1 + np.exp(-(2 * margins - 2)))
    kept = ~written | (draw.random(len(answers)) < 0.5)
    fitted = Abstain.fit([a for a, k in zip(answers, kept, strict=True) if k], written[kept], "abc", (1, 9), {})
    assert fitted.weights["margin"] == pytest.approx(2, abs=0.15)
    assert max(abs(w) for name, w in fitted.weights.items() if name != "margin") < 0.25
    odds = written.sum() / (~written).sum()
    judged = fitted.judge(Answer("", -1, -1, 1.0, 0.5))
    assert judged.written == pytest.approx(1 / (1 + odds), abs=0.02)  # where the rule says one half of all
    assert judged.abstained == (judged.written < 0.5)


def test_a_fit_of_what_can_be_told_apart_entirely_is_finite() -> None:
    answers = [Answer("", -1e-9, -1e-9, 9.0, 1.0)] * 5 + [Answer("", -3.0, -5.0, 0.1, 2.0)] * 5
    fitted = Abstain.fit(answers, np.arange(10) < 5, "abc", (1, 9), {})
    assert all(map(math.isfinite, [fitted.bias, *fitted.weights.values()]))
    assert [fitted.judge(answer).abstained for answer in answers] == [False] * 5 + [True] * 5


def test_auroc_counts_pairs() -> None:
    draw = np.random.default_rng(0)
    above, below = draw.integers(1, 9, 50), draw.integers(0, 6, 30)
    pairs = [(a > b) + (a == b) / 2 for a in above for b in below]
    assert _auroc(above, below) == pytest.approx(np.mean(pairs))


def test_accuracy_and_calibration_error_by_hand() -> None:
    """Of two written answers one is sure and one is not; of four others one is taken for written."""
    answers = {
        WRITTEN: [Answer("", -1, -1, 1, 1, p, p < 0.5) for p in (0.95, 0.35)],
        "other": [Answer("", -1, -1, 1, 1, p, p < 0.5) for p in (0.95, 0.05, 0.05, 0.35)],
    }
    found = Calibration("c", "t", Abstain({}, 0.0, "abc", (1, 9)), 2, 1, answers, np.array([True, False]))
    assert found.accuracy == pytest.approx((1 / 2 + 3 / 4) / 2)
    # Weights: 1/4 for each written, 1/8 for each other. Bins at 0.05, 0.35 and 0.95.
    assert [b["probability"] for b in found.bins] == pytest.approx([0.05, 0.35, 0.95])
    assert [b["weight"] for b in found.bins] == pytest.approx([0.25, 0.375, 0.375])
    assert [b["written"] for b in found.bins] == pytest.approx([0, 2 / 3, 2 / 3])
    assert found.ece == pytest.approx(0.25 * 0.05 + 0.375 * (2 / 3 - 0.35) + 0.375 * (0.95 - 2 / 3))
    assert (found.abstained(WRITTEN), found.abstained("other"), found.right_answered) == (0.5, 0.75, 1.0)
    assert balanced(np.array([True, False, False])).tolist() == [0.5, 0.25, 0.25]


def test_no_key_is_left_to_ask_for() -> None:
    """Of four keys two are written: in a third of the contexts both that begin alike."""
    task = build_task({"name": "kv", "pairs": 2, "alphabet": 2, "key_length": 2})
    with pytest.raises(GradmemError, match="take fewer pairs"):
        task.unwritten(task.batch("valid", 0, 40))


@pytest.mark.parametrize(
    "options", [{"pairs": 3}, {"pairs": 20, "alphabet": 8, "key_length": 2}, {"pairs": 4, "noise": 0.5}]
)
def test_keys_that_were_never_written(options: dict[str, int]) -> None:
    """By the text of the contexts: no such key stands there, and the hard ones nearly do."""
    task = build_task({"name": "kv", **options})
    batch = task.batch("test", 0, 5)
    contexts = [task.text(ids.tolist()) for ids in batch.context.ids]
    found = task.unwritten(batch)
    assert len(found) == 2
    for kind, asked in found.items():
        for prompt, row in zip(asked.prompts(), asked.rows.tolist(), strict=True):
            assert f"!{task.text(prompt)[2:]}" not in contexts[row]
            if kind == "one character off":
                assert f"!{task.text(prompt)[2]}" in contexts[row]
    assert all(f"!{task.text(p)[2:]}" in contexts[r] for p, r in zip(batch.prompts(), batch.rows.tolist(), strict=True))


@pytest.fixture(scope="module")
def calibrated(tiny: MemoryModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that was calibrated, and a memory of it."""
    folder = tmp_path_factory.mktemp("calibrated")
    tiny.save_pretrained(folder / "checkpoint")
    gradmem.load(folder / "checkpoint").write(TEXT).save(folder / "m.safetensors")
    arguments = ["--samples", "4", "--json", f"{folder}/c.json", "--figure", f"{folder}/c.png"]
    assert main(["calibrate", f"{folder}/checkpoint", *arguments]) == 0
    return folder


def test_calibrate(calibrated: Path) -> None:
    (row,) = json.loads((calibrated / "c.json").read_text())
    assert set(row["auroc"]) == {"of another context", "one character off"}
    assert sum(part["weight"] for part in row["bins"]) == pytest.approx(1)
    assert (calibrated / "c.png").read_bytes().startswith(b"\x89PNG")
    model = gradmem.load(calibrated / "checkpoint")
    assert model.abstain is not None
    assert model.abstain.weights == row["abstain"]["weights"]
    # An untrained model cannot tell: it says about one half, and nothing else would be calibrated.
    found = calibrate(model, 40, seed=2, options={"pairs": 2})
    assert found.label == "2 pairs"
    assert found.ece < 0.15


def test_ask_abstains(calibrated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memory = gradmem.open(calibrated / "m.safetensors")
    answers = memory.answer(["a7", "k2"])
    for threshold, abstained in ((0.0, False), (1.0, True)):
        place = calibrated / "checkpoint" / "abstain.json"
        place.write_text(json.dumps(json.loads(place.read_text()) | {"threshold": threshold}))
        assert main(["ask", f"{calibrated}/m.safetensors", "a7", "k2", "--abstain"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines == (["not in this memory"] * 2 if abstained else [answer.text for answer in answers])
        assert main(["ask", f"{calibrated}/m.safetensors", "a7", "--abstain", "--jsonl"]) == 0
        row = json.loads(capsys.readouterr().out)
        assert row["answer"] == (None if abstained else answers[0].text)
        assert row["written"] == pytest.approx(answers[0].written, abs=1e-4)


def test_abstain_belongs_to_its_weights(calibrated: Path, other: MemoryModel, tmp_path: Path) -> None:
    model = gradmem.load(calibrated / "checkpoint")
    model.save_pretrained(tmp_path / "again")
    assert gradmem.load(tmp_path / "again").abstain == model.abstain
    other.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "abstain.json").exists()
    assert model.abstain is not None
    model.abstain.save(tmp_path / "again")
    with pytest.raises(GradmemError, match="for another model"):
        gradmem.load(tmp_path / "again")
    for damage in ("{", "[]", '{"format": 2}', '{"format": 1, "weights": {}, "bias": 0, "checkpoint": "abc"}'):
        (tmp_path / "again" / "abstain.json").write_text(damage)
        with pytest.raises(GradmemError, match=r"abstain.json is damaged"):
            gradmem.load(tmp_path / "again")


def test_contexts_of_other_lengths_are_not_judged(calibrated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is fitted on 3 pairs, 22 tokens; one row of this memory is of 8, and another of 29."""
    model = gradmem.load(calibrated / "checkpoint")
    memory = model.write(["a7:Qz", TEXT, TEXT + "\n11:22"])
    answers = memory.answer([["a7"], ["a7"], ["a7"]])
    assert [answer.written is None for (answer,) in answers] == [True, False, True]
    memory[0].save(calibrated / "short.safetensors")
    assert main(["ask", f"{calibrated}/short.safetensors", "a7", "--abstain"]) == 2
    assert "contexts of 11 to 22 tokens" in capsys.readouterr().err


def test_refused(calibrated: Path, tiny: MemoryModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.save_pretrained(tmp_path / "plain")
    gradmem.load(tmp_path / "plain").write(TEXT).save(tmp_path / "m.safetensors")
    assert main(["ask", f"{tmp_path}/m.safetensors", "a7", "--abstain"]) == 2
    assert "was not calibrated" in capsys.readouterr().err
    assert main(["calibrate", "kv-16"]) == 2
    assert "name one with -o" in capsys.readouterr().err
    assert main(["calibrate", f"{calibrated}/checkpoint", "--samples", "1"]) == 2
    assert "at least 2 samples" in capsys.readouterr().err
    assert main(["calibrate", f"{calibrated}/checkpoint", "--pears", "1"]) == 2
    assert "'pears'" in capsys.readouterr().err
