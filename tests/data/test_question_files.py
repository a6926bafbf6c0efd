"""Files of texts with questions in their forms, and the choice of texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gradmem import GradmemError
from gradmem.data.question_files import choose_texts, read_texts
from helpers import DATA, needs

TEXTS = [("Ann has a dog.", [("Who?", ["Ann", "ann"]), ("What?", ["a dog"])]), ("Bo is old.", [("Who?", ["Bo"])])]


def official(texts: list) -> str:
    paragraphs = [
        {"context": text, "qas": [{"question": q, "answers": [{"text": a} for a in right]} for q, right in asked]}
        for text, asked in texts
    ]
    return json.dumps({"data": [{"title": "T", "paragraphs": paragraphs}]}, indent=1)


def grouped(texts: list) -> str:
    qas = [(text, [{"question": q, "answers": right} for q, right in asked]) for text, asked in texts]
    return "\n".join(json.dumps({"context": text, "qas": own}) for text, own in qas)


def one_a_line(texts: list) -> str:
    rows = [{"context": text, "question": q, "answers": right} for text, asked in texts for q, right in asked]
    return "\n".join(map(json.dumps, rows))


@pytest.mark.parametrize(
    ("name", "form"),
    [("a.json", official), ("a.jsonl", grouped), ("b.jsonl", one_a_line)],
    ids=["squad", "qas", "rows"],
)
def test_each_form_gives_the_same_texts(tmp_path: Path, name: str, form) -> None:
    (tmp_path / name).write_text(form(TEXTS))
    assert read_texts(tmp_path / name) == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "has no questions"),
        ("a.jsonl", '{"context": "c", "qas": []}\n', "has no questions"),
        ("a.jsonl", "Once upon a time\n", "line 1 is not JSON"),
        ("a.jsonl", '{"text": "c"}\n', "line 1 is no question"),
        ("a.jsonl", '{"context": "c", "question": "q", "answers": []}\n', "must be texts that are not empty"),
        ("a.jsonl", "[" * 100_000, "cannot read"),
        ("a.json", '{"data": []}', "has no questions"),
        ("a.json", "[1]", "is not a SQuAD file"),
        ("a.json", '{"data": [{"paragraphs": [{"context": "c"}]}]}', "is not in the format of SQuAD"),
        ("none.jsonl", None, "cannot read"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(GradmemError, match=message):
        read_texts(tmp_path / name)


def test_texts_are_chosen_by_length_in_a_random_order() -> None:
    texts = [(" ".join(["word"] * length), [("Q?", ["a"])] * 5) for length in range(1, 41)]
    chosen = choose_texts(texts, 10, 3, max_words=20, seed=1)
    lengths = [len(text.split()) for text, _ in chosen]
    assert len(set(lengths)) == 10
    assert max(lengths) <= 20
    assert {len(asked) for _, asked in chosen} == {3}
    assert choose_texts(texts, 10, 3, max_words=20, seed=1) == chosen != choose_texts(texts, 10, 3, 20, seed=2)
    assert choose_texts(texts, 4, 3, max_words=20, seed=1) == chosen[:4]
    assert choose_texts(texts, 4, 5, seed=None) == texts[:4]
    with pytest.raises(GradmemError, match="all 20 texts have more than 20 words"):
        choose_texts(texts[20:], 10, 3, max_words=20)
    with pytest.raises(GradmemError, match="contexts must be at least 1, not 0"):
        choose_texts(texts, 0, 3)


@pytest.mark.parametrize(
    ("name", "texts", "questions"),
    [
        ("squad_subset/dev.jsonl", 808, 3757),
        ("xquad_en/xquad.en.json", 240, 1190),
        ("qa/nq/nq-open-oracle.jsonl", 1516, 1537),
    ],
)
@needs("squad_subset", "xquad_en", "qa")
def test_real_files(name: str, texts: int, questions: int) -> None:
    found = read_texts(DATA / name)
    assert (len(found), sum(len(asked) for _, asked in found)) == (texts, questions)
