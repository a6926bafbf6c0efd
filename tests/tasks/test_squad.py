"""SQuAD: what its files hold, how answers are scored, and what a checkpoint takes along."""

from __future__ import annotations

import json
import re
import shutil
import string
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
import torch

import gradmem
from gradmem import GradmemError
from gradmem.batch import Batch
from gradmem.data import split_indices
from gradmem.evaluation import evaluate
from gradmem.tasks.squad import PROMPT, Squad
from helpers import text_model

END = "<|endoftext|>"


ROWS = [
    ("The quick fox ran.", "Who ran?", ["The quick fox", "fox"]),
    ("A red hen sat there.", "What sat?", ["hen"]),
    ("The quick fox ran.", "What did it do?", ["ran"]),
    ("One more paragraph, with more words in it.", "What is it?", ["One more paragraph"]),
]


@pytest.fixture
def paragraphs(tmp_path: Path) -> str:
    """A directory with the same questions in both splits, as JSON lines and as JSON of the official form."""
    lines = [json.dumps({"context": c, "question": q, "answers": a}) for c, q, a in ROWS]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    by_context: dict[str, list] = {}
    for context, question, answers in ROWS:
        texts = [{"text": answer, "answer_start": context.index(answer)} for answer in answers]
        by_context.setdefault(context, []).append({"question": question, "answers": texts, "id": "x"})
    qas = [{"context": context, "qas": qas} for context, qas in by_context.items()]
    (tmp_path / "dev-v1.1.json").write_text(json.dumps({"data": [{"title": "t", "paragraphs": qas}]}, indent=1))
    return str(tmp_path)


def queries(task: Squad, batch: Batch) -> list[tuple[str, str, str]]:
    """Context, prompt and target of each query as text."""
    found = []
    for row, ids, mask, labels in zip(batch.rows, batch.queries.ids, batch.queries.mask, batch.labels, strict=True):
        context = batch.context.ids[row][batch.context.mask[row]]
        parts = context, ids[mask & (labels == -100)], labels[labels != -100]
        found.append(tuple(task.tokenizer.decode(part) for part in parts))
    return found


def test_both_forms_of_file_give_the_same_samples(paragraphs: str, bytes_tokenizer: str) -> None:
    task = Squad(bytes_tokenizer, paragraphs)
    assert [task.size(split) for split in ("train", "valid", "test")] == [2, 1, 3]
    whole = task.batch("test", 0, 3)
    contexts = list(dict.fromkeys(row[0] for row in ROWS))
    shuffled = [contexts[i] for i in split_indices("test", 0, 3, 3, 0, shuffled=True)]
    wanted = sorted(ROWS, key=lambda row: shuffled.index(row[0]))
    assert queries(task, whole) == [(c, PROMPT.format(q), f" {a[0]}{END}") for c, q, a in wanted]
    assert whole.references == [a for _, _, a in wanted]
    assert whole.rows.tolist() == [shuffled.index(context) for context, _, _ in wanted]
    train = queries(task, task.batch("train", 0, 2)) + queries(task, task.batch("valid", 0, 1))
    assert sorted(train) == sorted(queries(task, whole))


def test_end_tokens_keep_their_loss_and_pads_have_none(paragraphs: str, bytes_tokenizer: str) -> None:
    task = Squad(bytes_tokenizer, paragraphs)
    assert task.pad_id != task.end_id
    batch = task.batch("test", 0, 3)
    assert not batch.queries.mask.all()
    assert torch.equal(batch.queries.mask, batch.queries.ids != task.pad_id)
    assert ((batch.labels == task.end_id).sum(1) == 1).all()
    assert (batch.labels[~batch.queries.mask] == -100).all()


def test_short_squad_and_cuts_are_counted(paragraphs: str, bytes_tokenizer: str) -> None:
    short = Squad(bytes_tokenizer, paragraphs, max_words=5)
    assert short.size("test") == 2
    assert short.notes("test") == ["1 of 3 test contexts are left out: they have more than 5 words"]
    cut = Squad(bytes_tokenizer, paragraphs, max_context=18, answer_length=12)
    assert int(cut.batch("test", 0, 3).context.lengths.max()) == 18
    assert cut.notes("test") == [
        "the end of 2 of 3 test contexts is left out, to keep to 18 tokens; 0 of 4 questions have no answer in what is "
        "left",
        "2 of 4 test targets are longer than 12 tokens and are asked, but cannot be answered whole",
    ]
    assert len(cut.batch("test", 0, 3).rows) == 4
    assert sum("left out" in note for note in cut.notes("train")) == 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "train.jsonl",
            '{"context": "a", "question": "b", "answers": ["c"]}\n{oops\n',
            "train.jsonl line 2 is not JSON",
        ),
        ("train.jsonl", '{"context": "a", "question": "b"}\n', "train.jsonl line 1 is no question.*answers"),
        ("train.jsonl", '{"context": "a", "question": "b", "answers": []}\n', "line 1 is no question.*empty"),
        ("train.jsonl", "[1]\n", "line 1 is no question"),
        ("train.json", '{"data":\n [,]}', "train.json line 2 is not JSON"),
        ("train.json", "{}", "needs a list `data`"),
        ("train.json", '{"data": [{"paragraphs": [{"context": "a"}]}]}', "not in the format of SQuAD"),
    ],
)
def test_malformed_files_are_named(name: str, text: str, message: str, bytes_tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(GradmemError, match=message):
        Squad(bytes_tokenizer, str(tmp_path)).size("train")


def official_scores(guess: str, truths: list[str]) -> tuple[float, float]:
    """Exact match and F1 as the evaluation script of SQuAD v1.1 defines them."""

    def normal(text: str) -> list[str]:
        plain = "".join(c for c in text.lower() if c not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", plain).split()

    def f1(truth: str) -> float:
        one, other = normal(guess), normal(truth)
        shared = sum((Counter(one) & Counter(other)).values())
        return 2 * shared / (len(one) + len(other)) if shared else 0.0

    return float(any(normal(guess) == normal(t) for t in truths)), max(map(f1, truths))


def test_scores_are_those_of_squad(bytes_tokenizer: str, paragraphs: str) -> None:
    task = Squad(bytes_tokenizer, paragraphs)
    batch = task.batch("test", 0, 3)
    guess_by_answer = {"The quick fox": " The  quick fox", "ran": "ran ran", "hen": " the red hen!"}
    guesses = [guess_by_answer.get(answers[0], " what") for answers in batch.references]
    generated = [[*task.encode(guess), task.end_id, *task.encode(" more")] for guess in guesses]
    scores = task.judge_generated(generated, batch)
    wanted = [official_scores(g, a) for g, a in zip(guesses, batch.references, strict=True)]
    assert scores["exact_match"].tolist() == [match for match, _ in wanted]
    assert scores["f1"].tolist() == pytest.approx([f1 for _, f1 in wanted])
    assert {0.0, 1.0} == {match for match, _ in wanted}
    assert any(0 < f1 < 1 for _, f1 in wanted)


def test_evaluation_generates_what_asking_gives(bytes_tokenizer: str, tmp_path: Path) -> None:
    """The references are what the untrained model happens to say, the same in part, or something else."""
    task = {"name": "squad", "tokenizer": bytes_tokenizer, "data": str(tmp_path), "answer_length": 9}
    model = text_model(task)
    said = [model.write(context, 1).ask(question) for context, question, _ in ROWS]
    truths = [[f"the {said[0]}"], ["something else"], ["nothing", said[2]], [f"{said[3]} and more"]]
    lines = [json.dumps({"context": c, "question": q, "answers": t}) for (c, q, _), t in zip(ROWS, truths, strict=True)]
    (tmp_path / "dev.jsonl").write_text("\n".join(lines))
    (result,) = evaluate(model, [1])
    assert (result.samples, result.queries, result.source) == (3, 4, str(tmp_path))
    by_context: dict[str, list[tuple[float, float]]] = {}
    for (context, _, _), answer, truth in zip(ROWS, said, truths, strict=True):
        by_context.setdefault(context, []).append(official_scores(answer, truth))
    means = [[sum(column) / len(rows) for column in zip(*rows, strict=True)] for rows in by_context.values()]
    match, f1 = (sum(column) / len(means) for column in zip(*means, strict=True))
    assert (result.exact_match, result.metrics["f1"]) == pytest.approx((match, f1))
    assert 0 < match < f1 < 1
    assert {"f1", "unwritten_f1", "swapped_f1", "exact_match", "task"} <= set(result.to_dict())


def test_a_checkpoint_takes_its_tokenizer_along(bytes_tokenizer: str, paragraphs: str, tmp_path: Path) -> None:
    elsewhere = shutil.copytree(bytes_tokenizer, tmp_path / "tokenizer")
    model = text_model({"name": "squad", "tokenizer": str(elsewhere), "data": paragraphs})
    model.save_pretrained(tmp_path / "checkpoint")
    shutil.rmtree(elsewhere)
    again = gradmem.load((tmp_path / "checkpoint").rename(tmp_path / "moved"))
    assert again.fingerprints == model.fingerprints
    assert str(tmp_path) not in (tmp_path / "moved" / "config.json").read_text()
    assert again.write("Some text.").ask("What?") == model.write("Some text.").ask("What?")
    assert evaluate(again, [0], task={"data": paragraphs})[0].samples == 3


def test_squad_without_data_says_so(bytes_tokenizer: str) -> None:
    with pytest.raises(GradmemError, match="needs `data`"):
        Squad(bytes_tokenizer).size("test")


def test_data_sets_of_the_hub(bytes_tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, config: str | None, split: str) -> list[dict]:
        asked.append((name, config, split))
        return [{"context": c, "question": q, "answers": {"text": a, "answer_start": [0]}} for c, q, a in ROWS]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    task = Squad(bytes_tokenizer, "someone/squad-of-a-test")
    assert task.size("test") == 3
    assert asked == [("someone/squad-of-a-test", None, "validation")]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(GradmemError, match="pip install datasets"):
        Squad(bytes_tokenizer, "someone/another").size("test")
