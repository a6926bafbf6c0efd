"""bAbI as users write it: what is accepted, what is refused, and what a story answers."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from babi_solver import OFFICIAL, ROOM, SMALL, THING, answers, asked, contexts, official
from gradmem import GradmemError
from gradmem.data.babi_stories import TASKS as GENERATED
from gradmem.model import MemoryModel
from gradmem.tasks.babi import NAMES, Babi
from gradmem.tasks.base import WRITTEN
from helpers import DATA, TINY_GRADMEM, TINY_LLAMA, needs


@pytest.mark.parametrize(
    "text",
    [
        "Mary moved to the bathroom. John went to the hallway.",
        "mary moved to the bathroom\njohn went to the hallway",
        "MARY moved, to the bathroom!  John went to the hallway",
        "1 Mary moved to the bathroom.\n2 John went to the hallway.\n3 Where is Mary? \tbathroom\t1",
    ],
)
def test_people_may_write_as_they_like(text: str) -> None:
    assert Babi().context_text(text) == "mary moved to the bathroom. john went to the hallway."


@pytest.mark.parametrize(
    "text",
    [
        "Mary moved to the bathroom.\nJohn went to the hallway.\t\n",
        "Mary moved to the bathroom.\n\tJohn went to the hallway.\n",
        "Mary moved to the bathroom.\tJohn went to the hallway.",
        "1 Mary moved to the bathroom.\n2\tJohn went to the hallway.",
        "\tMary moved\tto the bathroom.\t\n\tJohn went to the hallway.\t\n\t\n",
    ],
)
def test_tabs_are_white_space(text: str) -> None:
    assert Babi().context_text(text) == "mary moved to the bathroom. john went to the hallway."


BATHROOM = "Mary moved to the bathroom.\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BATHROOM + "Where is Mary?\t", "line 2: 'Where is Mary.' is no statement"),
        (BATHROOM + "John went to the hall. Where is Mary?\tbathroom", "line 2"),
        (BATHROOM + "3 Where is Mary?\tbathroom. John went to the hallway.", "line 2: .*no statement"),
        (BATHROOM + "\n-----\n", "line 3: '-----' is no sentence"),
        (BATHROOM + "...", "line 2: '...' is no sentence"),
        (BATHROOM + "Mary is in the garden.", "line 2: 'Mary is in the garden.' is no sentence .* 'Mary went to the k"),
        (BATHROOM + "She went to the garden.", "line 2: 'She went"),
        ("Mary and John went to the garden.", "'Mary and John went to the garden.' is no sentence"),
        ("Mary went to the garden; John went to the office.", "no sentence"),
        ("Mary went to the garden \N{PARTY POPPER}.", "characters that 'unnamed' does not know: \\['\N{PARTY POPPER}'"),
        ("Mary got the chocolate.", "no sentence"),
        ("The garden is north of the office. Mary went to the garden.", "write two"),
    ],
)
def test_no_line_vanishes(text: str, message: str) -> None:
    """What the model was not trained on is refused, with the sentence and its line."""
    model = MemoryModel.from_spec({"name": "babi", "tasks": "qa1,qa2,qa4"}, TINY_LLAMA, TINY_GRADMEM)
    with pytest.raises(GradmemError, match=message):
        model.write(text)


def test_sentences_of_other_tasks_are_refused() -> None:
    assert Babi("qa2").context_text("Mary got the milk there.") == "mary got the milk there."
    with pytest.raises(GradmemError, match="is no sentence"):
        Babi("qa1").context_text("Mary got the milk there.")
    assert Babi("qa1,qa8", data="somewhere").context_text("Mary is here.") == "mary is here."  # forms not known


@pytest.mark.parametrize(
    ("query", "asked"),
    [
        ("where is mary", "where is mary?"),
        ("Where\tis Mary?", "where is mary?"),
        ("3 Where is Mary? \tkitchen\t2", "where is mary?"),
        ("Where is Mary?\tkitchen", "where is mary?"),
        ("Is Mary in the garden?", None),
        ("Where is Mary? Where is John?", None),
        ("Where is the milk?", None),
        ("Where is Mary? She went to the garden.\tkitchen", None),
    ],
)
def test_questions_that_it_does_not_know_are_refused(query: str, asked: str | None) -> None:
    task = Babi("qa1")
    if asked:
        assert task.query_text(query) == asked
    else:
        with pytest.raises(
            GradmemError, match="is no question that it was trained on; ask questions like 'Where is Mary"
        ):
            task.query_text(query)


@pytest.mark.parametrize("name", GENERATED)
def test_a_story_is_read_as_the_solver_reads_it(name: str) -> None:
    """All that was asked of the story is among what it answers, and all of that is right."""
    task, asked = Babi(name), 0
    for seed in range(30):
        text, questions = task.example(seed)
        found = task.examples(text)
        assert {question for question, _ in questions} <= {question for question, _ in found}
        for question, answer in found:
            assert answers(re.findall(r"[^.]+\.", text.replace(". ", ".")), question)[-1] == answer
            asked += 1
    assert asked > 60


def test_what_calibration_asks() -> None:
    """Short and long stories. The solver knows what they answer; the rest is of names that they have not, or untold."""
    task = Babi("qa1,qa2,qa3")
    found = task.calibration("valid", 0, 60)
    stories = [re.findall(r"[^.]+\.", as_told(story)) for story in contexts(task, found[WRITTEN])]
    assert min(map(len, stories)) == 1
    assert max(map(len, stories)) > 20
    strange = {"of what is not named": True, "of what is not told": False}
    for kind, batch in found.items():
        assert torch.equal(batch.context.ids, found[WRITTEN].context.ids)
        assert len(batch.rows) > 100
        for prompt, labels, row in zip(batch.prompts(), batch.labels, batch.rows.tolist(), strict=True):
            question = as_told(task.text(prompt))
            known = answers(stories[row], question)
            if kind == WRITTEN:
                assert known[-1] == task.decode(labels[labels >= 0].tolist())
            else:
                assert not known
                names = re.findall(f"{ROOM}|{THING}|{'|'.join(map(str.capitalize, NAMES))}", question)
                assert strange[kind] == any(name not in " ".join(stories[row]) for name in names)
    again = task.calibration("valid", 0, 60)
    assert all(torch.equal(batch.queries.ids, again[kind].queries.ids) for kind, batch in found.items())


def as_told(text: str) -> str:
    """A text of the word-level tokenizer as it stands in the files."""
    text = re.sub(r" ([.?]) ?", r"\1", text)
    return re.sub("|".join(NAMES) + "|where", lambda word: word[0].capitalize(), text)


def test_text_is_tokenized_as_samples_are(small_babi: Path) -> None:
    task = Babi("qa1", data=str(small_babi))
    batch = task.batch("test", 0, 1)
    text = "Mary moved to the bathroom. John went to the hallway."
    assert task.encode(task.context_text(text)) == batch.context.ids[0].tolist()
    for question in ("Where is Mary?", "where is mary", "Where is Mary? \tbathroom\t1"):
        ids = task.encode(task.query_text(question))
        assert ids == batch.queries.ids[0, : len(ids)].tolist()
    assert task.examples(SMALL) == [("Where is Mary?", "office"), ("Where is John?", "garden")]
    # Of stories whose sentences it does not know, those that stand after the last of them.
    assert Babi("qa6", data="somewhere").examples(SMALL) == [("Where is John?", "garden")]


@pytest.mark.parametrize("answer", ["Bill", "kitchen", "apple,milk", "milk,football,apple", "n,w", "nothing"])
def test_answers_come_back_as_the_files_have_them(answer: str) -> None:
    task = Babi()
    ids = [*task.encode(answer), task.end_id]
    assert task.decode([*ids, task.pad_id]) == answer
    assert len(ids) <= task.answer_length


def test_a_model_writes_and_answers_and_names_unknown_words() -> None:
    torch.manual_seed(0)
    model = MemoryModel.from_spec({"name": "babi", "tasks": "qa1"}, TINY_LLAMA, TINY_GRADMEM)
    memory = model.write("Mary moved to the bathroom. John went to the hallway")
    assert isinstance(memory.ask("Where is Mary?"), str)
    with pytest.raises(GradmemError, match=r"words that .* does not know: \['zebedee', 'zoo'\]"):
        model.write("Zebedee went to the zoo.")
    with pytest.raises(GradmemError, match="is no statement"):
        model.write("Mary moved to the bathroom. Where is Mary?")


@needs("babi_v1.1_en", "gpt2_tokenizer")
@pytest.mark.parametrize("name", ["qa1", "qa4", "qa20"])
def test_pretrained_tokenizers_see_the_files_as_they_are(name: str) -> None:
    """But for names in small letters, which questions of qa20 have; and people may write as they like."""
    task = Babi(name, data=str(OFFICIAL), tokenizer=str(DATA / "gpt2_tokenizer"))
    batch = task.batch("test", 0, task.size("test") or 0)
    wanted, got = Counter(), Counter()
    for statements, given, answer in asked(official(name, "test")):
        context = " ".join(statements)
        question = re.sub("antoine|jason|sumit|yann", lambda name: name[0].capitalize(), given)
        wanted[context, f"{question} {answer}<|endoftext|>"] += 1
        assert task.context_text(context.lower()) == context
        assert task.query_text(given.lower().rstrip("?")) == question
    for query, mask, row in zip(batch.queries.ids, batch.queries.mask, batch.rows, strict=True):
        context = batch.context.ids[row][batch.context.mask[row]]
        got[task.tokenizer.decode(context), task.tokenizer.decode(query[mask])] += 1
    assert got == wanted
    labels = [task.decode(row[row != -100].tolist()) for row in batch.labels]
    assert set(labels) == {answer for *_, answer in asked(official(name, "test"))}
    assert (batch.labels != -100).sum(1).max() <= task.answer_length


@needs("stories260K_hf")
@pytest.mark.parametrize("answer", ["Bill", "kitchen", "milk,football,apple", "n,w", "nothing"])
def test_answers_of_many_tokens_come_back(answer: str) -> None:
    task = Babi(tokenizer=str(DATA / "stories260K_hf"))
    prompt, target = task.encode_pair("Where is Mary?", f" {answer}")
    assert task.tokenizer.decode(prompt) == "Where is Mary?"
    assert len(prompt) < len(task.encode(f"Where is Mary? {answer}")) < len(prompt) + len(target)
    assert task.decode([*target, task.pad_id]) == answer
    assert len(target) <= task.answer_length


def test_an_example_is_a_story_that_answers_its_questions() -> None:
    """Of qa1, the answers are the last rooms that people went to; what cannot be generated has none."""
    for seed in range(5):
        text, questions = Babi("qa1").example(seed)
        last = dict(re.findall(r"(\w+) [a-z ]+ the (\w+)\.", text))
        assert {(f"Where is {name}?", room) for name, room in last.items()} == set(questions)
        assert questions
    assert len({Babi("qa1,qa4,qa5").example(seed)[0] for seed in range(20)}) == 20
    assert Babi("qa6", data="somewhere").example() is None
