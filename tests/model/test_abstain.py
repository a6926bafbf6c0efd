"""What speaks for an answer, against slow references; when to abstain, against closed forms; and the commands."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_tensors

import gradmem
from cases import ALL, TEXT, build
from gradmem import Answer, GradmemError, MemoryModel
from gradmem.batch import Tokens
from gradmem.cli.main import main
from gradmem.evaluation.calibrate import RIGHT, WRONG, Calibration, _auroc, calibrate
from gradmem.model.abstain import FILE, Abstain, balanced
from gradmem.model.build import build_task
from gradmem.model.reading import statement_losses
from helpers import tiny_model


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


def test_near_loss_is_that_of_the_chunk_that_says_it() -> None:
    model = tiny_model(0)  # of its own: other tests share `tiny`
    model.configure({"chunk_size": 15, "chunk_mode": "independent"})
    memory = model.write(["a0:bc\nd1:ef\ng2:hi", "a0:bc"])
    texts = ["!a0:bc!", "!g2:hi!"]
    claims = [model.task.encode(text) for text in texts]
    rows = model.method.split_chunks(memory)
    assert len(rows) == 3
    every = [statement_losses(model.method, rows, [claim] * 3) for claim in claims]
    found = [statement_losses(model.method, memory, [claim] * 2) for claim in claims]
    assert found == [pytest.approx([min(first, second), alone]) for first, second, alone in every]


def test_several_answers_to_a_query_are_refused(tiny: MemoryModel) -> None:
    with pytest.raises(GradmemError, match="one answer for each query"):
        tiny.write(TEXT).answer("a7", num_beams=2)


def random_answers(count: int, seed: int = 0) -> list[Answer]:
    draw = np.random.default_rng(seed)
    return [
        Answer(
            "", float(-draw.exponential()), float(-draw.exponential(2)), float(draw.exponential()), float(draw.random())
        )
        for _ in range(count)
    ]


def test_a_fit_finds_the_rule_that_made_the_data() -> None:
    """Classes drawn by a logistic rule of the margin and of one state; either class weighs one half."""
    answers, draw = random_answers(8_000), np.random.default_rng(1)
    states = torch.randn(len(answers), 6, generator=torch.Generator().manual_seed(2))
    margins = np.array([answer.margin for answer in answers])
    rule = 1 / (1 + np.exp(-(2 * margins - 2 + 1.5 * states[:, 3].numpy())))
    written = draw.random(len(answers)) < rule
    fitted = Abstain.fit(answers[1000:], states[1000:], written[1000:], np.arange(7_000) // 8, "abc", (1, 9), {})
    assert fitted.fitted == {"hidden_states": True}
    judged = fitted.judge(answers[:1000], states[:1000])
    odds = (~written).sum() / written.sum()
    wanted = rule[:1000] * odds / (rule[:1000] * odds + 1 - rule[:1000])
    found = np.array([one.written for one in judged])
    assert np.abs(found - wanted).mean() < 0.06
    assert np.corrcoef(found, wanted)[0, 1] > 0.97
    assert [one.abstained for one in judged] == [p < 0.5 for p in found]


def test_a_fit_of_what_can_be_told_apart_entirely_is_finite() -> None:
    answers = [Answer("", -1e-9, -1e-9, 9.0, 1.0)] * 50 + [Answer("", -3.0, -5.0, 0.1, 2.0)] * 50
    states = torch.zeros(100, 4)
    fitted = Abstain.fit(answers, states, np.arange(100) < 50, np.arange(100), "abc", (1, 9), {})
    assert all(bool(tensor.isfinite().all()) for tensor in fitted.weights.values())
    assert [one.abstained for one in fitted.judge(answers, states)] == [False] * 50 + [True] * 50
    alone = Abstain.fit(answers, states, np.arange(100) < 50, np.full(100, 7), "abc", (1, 9), {})  # one context
    assert alone.fitted == {"hidden_states": False}


def test_few_contexts_are_judged_by_the_features_alone() -> None:
    """A thousand numbers of noise tell the answers of a few contexts apart by heart, and no others."""
    answers, draw = random_answers(2_400), np.random.default_rng(1)
    states = torch.randn(len(answers), 1_000, generator=torch.Generator().manual_seed(2))
    margins = np.array([answer.margin for answer in answers])
    written = draw.random(len(answers)) < 1 / (1 + np.exp(2 - 2 * margins))
    fitted = Abstain.fit(answers[:400], states[:400], written[:400], np.arange(400) // 8, "abc", (1, 9), {})
    assert fitted.fitted == {"hidden_states": False}
    found, other = (
        np.array([one.written for one in fitted.judge(answers[400:], own[400:])]) for own in (states, -states)
    )
    assert np.array_equal(found, other)
    best = _auroc(margins[400:][written[400:]], margins[400:][~written[400:]])
    assert _auroc(found[written[400:]], found[~written[400:]]) > best - 0.02


def test_whether_hidden_states_help_is_tried_on_contexts_that_are_left_out() -> None:
    """States that know no more than which context is asked tell the answers apart, but not those of other contexts."""
    answers, draw = random_answers(800), np.random.default_rng(1)
    contexts = np.arange(800) // 8
    written = np.repeat(draw.random(100) < 0.5, 8)
    states = torch.randn(100, 64, generator=torch.Generator().manual_seed(2))[contexts]
    fitted = Abstain.fit(answers, states, written, contexts, "abc", (1, 9), {})
    assert fitted.fitted == {"hidden_states": False}
    alike = Abstain.fit(answers, states, written, np.arange(800), "abc", (1, 9), {})
    assert alike.fitted == {"hidden_states": True}


def test_auroc_counts_pairs() -> None:
    draw = np.random.default_rng(0)
    above, below = draw.integers(1, 9, 50), draw.integers(0, 6, 30)
    pairs = [(a > b) + (a == b) / 2 for a in above for b in below]
    assert _auroc(above, below) == pytest.approx(np.mean(pairs))


def test_accuracy_and_calibration_error_by_hand() -> None:
    """Of two written answers one is sure and one is not; of four others one is taken for written."""
    answers = {
        RIGHT: [Answer("", -1, -1, 1, 1, p, p < 0.5) for p in (0.95, 0.35)],
        WRONG: [Answer("", -1, -1, 1, 1, p, p < 0.5) for p in (0.95, 0.05)],
        "other": [Answer("", -1, -1, 1, 1, p, p < 0.5) for p in (0.05, 0.35)],
    }
    found = Calibration("c", "t", Abstain({}, "abc", (1, 9)), 2, 1, answers)
    assert found.accuracy == pytest.approx((1 / 2 + 3 / 4) / 2)
    # Weights: 1/4 for each written, 1/8 for each other. Bins at 0.05, 0.35 and 0.95.
    assert [b["probability"] for b in found.bins] == pytest.approx([0.05, 0.35, 0.95])
    assert [b["weight"] for b in found.bins] == pytest.approx([0.25, 0.375, 0.375])
    assert [b["written"] for b in found.bins] == pytest.approx([0, 2 / 3, 2 / 3])
    assert found.ece == pytest.approx(0.25 * 0.05 + 0.375 * (2 / 3 - 0.35) + 0.375 * (0.95 - 2 / 3))
    assert (found.abstained(RIGHT), found.abstained(WRONG), found.abstained("other")) == (0.5, 0.5, 1.0)
    assert (found.exact_match, found.right_answered) == (0.5, 0.5)
    assert balanced(np.array([True, False, False])).tolist() == [0.5, 0.25, 0.25]


def test_no_key_is_left_to_ask_for() -> None:
    """Of four keys two are written: in a third of the contexts both that begin alike."""
    task = build_task({"name": "kv", "pairs": 2, "alphabet": 2, "key_length": 2})
    with pytest.raises(GradmemError, match="use fewer pairs"):
        task.unanswerable(task.batch("valid", 0, 40))


@pytest.mark.parametrize(
    "options", [{"pairs": 3}, {"pairs": 20, "alphabet": 8, "key_length": 2}, {"pairs": 4, "noise": 0.5}]
)
def test_keys_that_were_never_written(options: dict[str, int]) -> None:
    """By the text of the contexts: no such key stands there, and the hard ones nearly do."""
    task = build_task({"name": "kv", **options})
    batch = task.batch("test", 0, 5)
    contexts = [task.text(ids.tolist()) for ids in batch.context.ids]
    found = task.unanswerable(batch)
    assert len(found) == 2
    for kind, asked in found.items():
        for prompt, row in zip(asked.prompts(), asked.rows.tolist(), strict=True):
            assert f"!{task.text(prompt)[2:]}" not in contexts[row]
            if kind == "one character off":
                assert f"!{task.text(prompt)[2]}" in contexts[row]
    assert all(f"!{task.text(p)[2:]}" in contexts[r] for p, r in zip(batch.prompts(), batch.rows.tolist(), strict=True))


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that was calibrated for few pairs, and a memory of it."""
    folder = tmp_path_factory.mktemp("calibrated")
    model = gradmem.load("kv-16")
    model.abstain = None
    model.save_pretrained(folder / "checkpoint")
    gradmem.load(folder / "checkpoint").write(TEXT).save(folder / "m.safetensors")
    arguments = ["--samples", "27", "--pairs", "4", "--json", f"{folder}/c.json", "--figure", f"{folder}/c.png"]
    assert main(["calibrate", f"{folder}/checkpoint", *arguments]) == 0
    return folder


def test_calibrate(calibrated: Path) -> None:
    (row,) = json.loads((calibrated / "c.json").read_text())
    assert set(row["auroc"]) - {WRONG} == {"of another context", "one character off"}
    assert sum(part["weight"] for part in row["bins"]) == pytest.approx(1)
    assert row["exact_match"] > 0.8
    assert (calibrated / "c.png").read_bytes().startswith(b"\x89PNG")
    model = gradmem.load(calibrated / "checkpoint")
    assert model.abstain is not None
    assert model.abstain.context_tokens == (8, 29)  # 1, 2 and 4 pairs
    assert model.abstain.fitted["task"]["pairs"] == 4
    assert model.abstain.fitted["samples"] == 24  # of the 27 that were asked for: whole batches of eight


def test_a_model_that_answers_nothing_right_cannot_be_calibrated(tiny: MemoryModel) -> None:
    with pytest.raises(GradmemError, match=r"0 of \d+ answers are right: calibration needs both"):
        calibrate(tiny, 4)


def test_ask_abstains(calibrated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memory = gradmem.open(calibrated / "m.safetensors")
    answers = memory.answer(["a7", "k2"])
    for threshold, abstained in ((0.0, False), (1.1, True)):
        model = gradmem.load(calibrated / "checkpoint")
        assert model.abstain is not None
        dataclasses.replace(model.abstain, threshold=threshold).save(calibrated / "checkpoint")
        assert main(["ask", f"{calibrated}/m.safetensors", "a7", "k2", "--abstain"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines == (["not in this memory"] * 2 if abstained else [answer.text for answer in answers])
        assert main(["ask", f"{calibrated}/m.safetensors", "a7", "--abstain", "--jsonl"]) == 0
        row = json.loads(capsys.readouterr().out)
        assert row["answer"] == (None if abstained else answers[0].text)
        assert row["written"] == pytest.approx(answers[0].written, abs=1e-4)


def test_the_example_of_the_readme_is_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three pairs in a checkpoint for 32: what was written is answered, and other keys are not."""
    memory = gradmem.load("kv-32").write("a7:Qz\nk2:9f\nzz:aa")
    memory.save(tmp_path / "m.safetensors")
    assert [(one.text, one.abstained) for one in memory.answer(["a7", "k2"])] == [("Qz", False), ("9f", False)]
    assert main(["ask", f"{tmp_path}/m.safetensors", "a7", "k2", "--abstain"]) == 0
    assert capsys.readouterr().out.splitlines() == ["Qz", "9f"]
    strange = memory.answer(["b3", "Xy", "k7", "00", "q9", "M4", "tt", "8e"])
    assert sum(one.abstained for one in strange) >= 6


def test_abstain_belongs_to_its_weights(calibrated: Path, other: MemoryModel, tmp_path: Path) -> None:
    model = gradmem.load(calibrated / "checkpoint")
    model.save_pretrained(tmp_path / "again")
    again = gradmem.load(tmp_path / "again").abstain
    assert model.abstain is not None
    assert again is not None
    assert {**vars(again), "weights": 0} == {**vars(model.abstain), "weights": 0}
    assert all(torch.equal(again.weights[name], tensor) for name, tensor in model.abstain.weights.items())
    other.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / FILE).exists()
    model.abstain.save(tmp_path / "again")
    with pytest.raises(GradmemError, match="for another model"):
        gradmem.load(tmp_path / "again")
    whole = (tmp_path / "again" / FILE).read_bytes()
    less = {name: tensor for name, tensor in model.abstain.weights.items() if name != "second"}
    other_format = save_tensors(model.abstain.weights, {"format": "1"})
    for damage in (b"{", whole[:-9], b"", save_tensors(less, {"format": "2", "about": "{}"}), other_format):
        (tmp_path / "again" / FILE).write_bytes(damage)
        with pytest.raises(GradmemError, match=rf"{FILE} is damaged"):
            gradmem.load(tmp_path / "again")


def test_contexts_that_it_was_not_fitted_for_are_not_judged(
    calibrated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is fitted on 8 to 29 tokens; one row of this memory is of 36. What was appended is no context of its own."""
    model = gradmem.load(calibrated / "checkpoint")
    memory = model.write(["a7:Qz", TEXT, TEXT + "\n11:22\n33:44"])
    answers = memory.answer([["a7"], ["a7"], ["a7"]])
    assert [answer.written is None for (answer,) in answers] == [False, False, True]
    memory[2].save(calibrated / "long.safetensors")
    assert main(["ask", f"{calibrated}/long.safetensors", "a7", "--abstain"]) == 2
    assert "contexts of 8 to 29 tokens" in capsys.readouterr().err
    assert model.append(memory[0], "k2:9f", may_forget=True).answer("a7").written is None


def test_refused(calibrated: Path, tiny: MemoryModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.save_pretrained(tmp_path / "plain")
    gradmem.load(tmp_path / "plain").write(TEXT).save(tmp_path / "m.safetensors")
    assert main(["ask", f"{tmp_path}/m.safetensors", "a7", "--abstain"]) == 2
    assert "was not calibrated" in capsys.readouterr().err
    assert main(["calibrate", "kv-16"]) == 2
    assert "give one with -o" in capsys.readouterr().err
    assert main(["calibrate", f"{calibrated}/checkpoint", "--samples", "1"]) == 2
    assert "at least 2 samples" in capsys.readouterr().err
    assert main(["calibrate", f"{calibrated}/checkpoint", "--pears", "1"]) == 2
    assert "'pears'" in capsys.readouterr().err
