"""bAbI: batches of generated stories and of files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from babi_solver import ROOM, contexts, rows
from gradmem import GradmemError
from gradmem.data.babi_stories import GIVERS, OBJECTS, PEOPLE, ROOMS
from gradmem.tasks.babi import NAMES, Babi


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generate few samples at once: tests look at a few."""
    monkeypatch.setattr("gradmem.tasks.babi.BLOCK", 64)


def test_batches_are_a_pure_function() -> None:
    whole = rows(Babi("1,5"), Babi("1,5").batch("train", 0, 40, seed=3))
    task = Babi("1,5")
    parts = [row for start in (30, 0, 10, 20) for row in rows(task, task.batch("train", start, 10, seed=3))]
    assert sorted(parts) == sorted(whole)
    assert parts[:10] == whole[30:]
    for other in (("valid", 3), ("test", 3), ("train", 4)):
        assert not set(whole) & set(rows(task, task.batch(other[0], 0, 40, seed=other[1]))[1::2])


def test_training_may_ask_everything_and_measuring_does_not() -> None:
    task = Babi("1", ask_all=True)
    batch = task.batch("train", 0, 40)
    for row, context in enumerate(contexts(task, batch)):
        people = set(re.findall("daniel|john|mary|sandra", context))
        assert sum(batch.rows == row) == len(people)
    assert len(task.batch("valid", 0, 40).queries.ids) == 40


def test_stories_that_are_never_so_short_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An object must be taken and carried to two rooms before qa3 can ask."""
    monkeypatch.setattr("gradmem.data.babi_stories.MAX_TRIES", 50)
    with pytest.raises(GradmemError, match="no question of qa3 comes within 2 statements"):
        Babi("3", max_statements=2).batch("train", 0, 1)


def test_training_may_be_crowded_and_measuring_is_not() -> None:
    for name in ("1", "5"):
        task = Babi(name, crowded=True)
        crowd, few = (
            set(re.findall("|".join(NAMES), " ".join(contexts(task, task.batch(split, 0, 400)))))
            for split in ("train", "valid")
        )
        assert (len(crowd), len(few)) == (len(NAMES), 4)


def test_unwritten_questions_are_about_what_the_story_does_not_mention() -> None:
    task = Babi("qa1,qa2,qa3,qa4,qa5")
    batch = task.batch("test", 0, 50, seed=1)
    (asked,) = task.unanswerable(batch).values()
    originals = [task.text(prompt).split() for prompt in batch.prompts()]
    assert len(asked.rows) > 20
    assert torch.equal(asked.context.ids, batch.context.ids)
    for prompt, row in zip(asked.prompts(), asked.rows.tolist(), strict=True):
        question, story = task.text(prompt).split(), task.text(batch.context.ids[row].tolist()).split()
        original = originals[batch.rows.tolist().index(row)]
        ((before, after),) = [pair for pair in zip(original, question, strict=True) if pair[0] != pair[1]]
        assert after not in story
        names = [{word.lower() for word in kind} for kind in (ROOMS, OBJECTS, PEOPLE, GIVERS)]
        assert any({before, after} <= kind for kind in names)


def test_stories_may_be_kept_short() -> None:
    task = Babi("2", max_statements=6)
    assert {text.count(".") for text in contexts(task, task.batch("train", 0, 200))} == {2, 4, 6}


def test_masks_and_labels_leave_out_pads() -> None:
    task = Babi("1,4,5")
    batch = task.batch("train", 0, 30)
    assert not batch.context.mask.all()
    assert not batch.queries.mask.all()
    assert torch.equal(batch.context.mask, batch.context.ids != task.pad_id)
    assert (batch.labels[~batch.queries.mask] == -100).all()
    for ids, labels in zip(batch.queries.ids.tolist(), batch.labels.tolist(), strict=True):
        start = ids.index(task.tokenizer.convert_tokens_to_ids("?")) + 1
        stop = ids.index(task.end_id) + 1
        assert labels == [-100] * start + ids[start:stop] + [-100] * (len(ids) - stop)


def test_tasks_take_turns() -> None:
    task = Babi([1, 4])
    told = [query for _, query in rows(task, task.batch("train", 0, 20))]
    assert all(query.startswith("where is") == (i % 2 == 0) for i, query in enumerate(told))


def test_training_goes_round_in_new_orders(small_babi: Path) -> None:
    text = "".join(f"1 Mary moved to the {room}.\n2 Where is Mary?\t{room}\t1\n" for room in ROOM.split("|")[:6] * 4)
    (small_babi / "qa1_single_train.txt").write_text(text)
    task = Babi("qa1", data=str(small_babi))
    size = task.size("train")
    assert size == 22
    drawn = [rows(task, task.batch("train", i, 1, 7))[0] for i in range(3 * size)]
    epochs = [drawn[i : i + size] for i in range(0, len(drawn), size)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]
    assert rows(task, task.batch("train", size - 5, 10, 7)) == drawn[size - 5 : size + 5]


def test_a_part_of_training_can_be_generated(small_babi: Path) -> None:
    task = Babi("qa1", data=str(small_babi), generated=0.25)
    assert task.size("train") is None
    assert task.size("test") == 3
    told = contexts(task, task.batch("train", 0, 400))
    from_file = contexts(task, Babi("qa1", data=str(small_babi)).batch("train", 0, 2))
    assert sum(context in from_file for context in told) == pytest.approx(300, abs=2)
    assert task.source("train").endswith("25% generated")


def test_cut_contexts_lose_whole_old_statements_and_are_counted(small_babi: Path) -> None:
    task = Babi("qa1", data=str(small_babi), max_context=16)
    assert rows(task, task.batch("test", 2, 1))[0][0] == "john went to the hallway . mary went to the office ."
    assert "the oldest statements of 1 of 3 test contexts are left out, to keep to 16 tokens" in task.notes("test")
    assert re.search(r"of \d+ of 64 generated contexts of qa3", Babi("qa3", max_context=100).notes("train")[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": "qa21"}, "unknown bAbI task 'qa21'"),
        ({"tasks": "qa1,qa1"}, "each task once"),
        ({"generated": 2.0}, "generated must be"),
        ({"max_context": 3}, "max_context must be"),
        ({"max_statements": 1}, "max_statements must be"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(GradmemError, match=message):
        Babi(**options)


def test_what_cannot_be_generated_is_refused_when_it_is_wanted() -> None:
    """Not before: a checkpoint of qa6 loads and answers without data."""
    with pytest.raises(GradmemError, match="qa6 cannot be generated"):
        Babi("qa1,qa6").batch("test", 0, 2)


def test_exact_match_is_on_the_whole_answer(small_babi: Path) -> None:
    lines = "1 Mary got the milk there.\n2 Mary got the apple there.\n3 What is Mary carrying?\tmilk,apple\n"
    (small_babi / "qa8_lists_test.txt").write_text(lines)
    task = Babi("qa8", data=str(small_babi))
    batch = task.batch("test", 0, 1)
    target = batch.labels[batch.labels != -100]
    assert task.tokenizer.decode(target) == "milk , apple [END]"
    for wrong in (None, 0, 1, 2, 3):
        predicted = target.clone()
        if wrong is not None:
            predicted[wrong] = task.encode("there")[0]
        logits = torch.nn.functional.one_hot(predicted, len(task.tokenizer)).float()
        assert task.judge(logits, batch)["exact_match"].tolist() == [wrong is None]
