"""The files of bAbI: read whole, and refused by line."""

from __future__ import annotations

import re
import statistics
import sys
import types
from collections import Counter
from functools import cache
from itertools import pairwise
from mmap import mmap
from pathlib import Path

import pytest

from babi_solver import OFFICIAL, SMALL, asked, official, rows, same
from gradmem import GradmemError
from gradmem.data.babi_files import TASKS, WORDS, read_excerpts
from gradmem.tasks.babi import Babi
from helpers import needs


def test_contexts_are_the_story_so_far_without_questions(small_babi: Path) -> None:
    task = Babi("qa1", data=str(small_babi))
    assert [task.size(split) for split in ("train", "valid", "test")] == [2, 1, 3]
    assert rows(task, task.batch("test", 0, 3)) == [
        ("mary moved to the bathroom . john went to the hallway .", "where is mary ? bathroom [END]"),
        ("mary moved to the bathroom . john went to the hallway .", "where is john ? hallway [END]"),
        ("john moved to the kitchen .", "where is john ? kitchen [END]"),
        (
            "mary moved to the bathroom . john went to the hallway . mary went to the office .",
            "where is mary ? office [END]",
        ),
    ]
    assert task.notes("test") == [
        "qa1: 2 of 3 test contexts occur word for word in the training files, and 3 of 4 with the same question"
    ]
    with pytest.raises(GradmemError, match="3 samples"):
        task.batch("test", 2, 2)


def test_cached_samples_are_the_same_and_follow_the_file(small_babi: Path) -> None:
    first = Babi("qa1", data=str(small_babi)).batch("test", 0, 3)
    again = Babi("qa1", data=str(small_babi))
    assert same(first, again.batch("test", 0, 3))
    assert isinstance(again.samples("test").arrays["context"].base, mmap)
    (small_babi / "qa1_single_test.txt").write_text(SMALL.replace("garden", "office"))
    assert not same(first, Babi("qa1", data=str(small_babi)).batch("test", 0, 3))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("3 John slept in the hallway.", "line 9.*slept"),
        ("5 John moved to the garden.", "line 9.*not in the format"),
        ("John moved to the garden.", "line 9.*not in the format"),
        ("3 Where is John?\t", "line 9.*not in the format"),
        ("", "line 9.*not in the format"),
    ],
)
def test_a_malformed_line_is_named(small_babi: Path, line: str, message: str) -> None:
    (small_babi / "qa1_single_test.txt").write_text(SMALL + line + "\n")
    with pytest.raises(GradmemError, match=rf"qa1_single_test.txt {message}"):
        Babi("qa1", data=str(small_babi)).size("test")


def test_test_files_alone_can_be_measured(small_babi: Path) -> None:
    (small_babi / "qa1_single_train.txt").unlink()
    (note,) = Babi("qa1", data=str(small_babi)).notes("test")
    assert note.startswith("test contexts are not compared")


def test_missing_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(GradmemError, match="no data at"):
        Babi(data=str(tmp_path / "none")).size("test")
    with pytest.raises(GradmemError, match=r"one file qa1_\*_test.txt"):
        Babi(data=str(tmp_path)).size("test")


def test_data_sets_of_the_hub(small_babi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, config: str, split: str) -> list[dict]:
        assert (name, config) == ("someone/babi-of-a-test", "en-qa1")
        lines = (small_babi / f"qa1_single_{split}.txt").read_text().splitlines()
        parts = [[*line.partition(" ")[2].split("\t"), ""][:2] for line in lines]
        ids = [line.partition(" ")[0] for line in lines]
        return [{"story": {"id": ids, "text": [p[0] for p in parts], "answer": [p[1] for p in parts]}}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    theirs, ours = Babi("qa1", data="someone/babi-of-a-test"), Babi("qa1", data=str(small_babi))
    for split in ("train", "test"):
        assert same(theirs.batch(split, 0, 2), ours.batch(split, 0, 2))
    assert theirs.notes("test") == ours.notes("test")


def test_text_that_is_not_utf8_is_named(small_babi: Path) -> None:
    (small_babi / "qa1_single_test.txt").write_bytes(SMALL.encode() + b"1 Mary \xff\n")
    with pytest.raises(GradmemError, match="line 9 is not UTF-8"):
        Babi("qa1", data=str(small_babi)).size("test")


@needs("babi_v1.1_en")
def test_the_vocabulary_is_that_of_the_training_files() -> None:
    words = {
        word
        for file in OFFICIAL.glob("*_train.txt")
        for line in file.read_text().lower().splitlines()
        for part in line.partition(" ")[2].split("\t")[:2]
        for word in re.findall(r"[a-z]+|[^\sa-z]", part)
    }
    assert sorted(words) == sorted(WORDS)


@needs("babi_v1.1_en")
@pytest.mark.parametrize("name", TASKS)
def test_all_official_files_are_read_whole(name: str) -> None:
    words = Counter()
    found = read_excerpts(str(OFFICIAL), name, "test", lambda sentence: words.update([sentence]))
    stories = official(name, "test")
    assert Counter(map(str, asked([found]))) == Counter(map(str, asked(stories)))
    assert {sentence for statements, *_ in asked(stories) for sentence in statements} <= set(words), "all are checked"


@needs("babi_v1.1_en")
@pytest.mark.parametrize("name", ["qa1", "qa2", "qa3"])
def test_a_few_contexts_stand_for_all(name: str) -> None:
    """They are as long in the mean, and neighbours are of different stories, whose memories evaluation swaps."""
    told = [one.statements for one in read_excerpts(str(OFFICIAL), name, "test", lambda _: None)]
    assert statistics.mean(map(len, told[:200])) == pytest.approx(statistics.mean(map(len, told)), rel=0.1)
    assert not any(two[: len(one)] == one or one[: len(two)] == two for one, two in pairwise(told))


@needs("babi_v1.1_en")
@pytest.mark.parametrize("name", ["qa1", "qa8", "qa19", "qa20"])
def test_samples_are_the_official_files(name: str) -> None:
    """Answers of one word, lists, paths and reasons."""
    task = Babi(name, data=str(OFFICIAL))
    written = cache(task.context_text)
    told = asked(official(name, "test"))
    batch = task.batch("test", 0, task.size("test") or 0)
    wanted = Counter((" ".join(map(written, statements)), *asked) for statements, *asked in told)
    got = Counter()
    for context, query in rows(task, batch):
        question, _, answer = query.partition(" ? ")
        got[context.replace(" .", "."), question, task.answer_text(answer.removesuffix(" [END]"))] += 1
    assert got == Counter({(c, q.lower().rstrip("?"), a): n for (c, q, a), n in wanted.items()})
