"""The files of bAbI: their format and their words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..errors import GradmemError, unknown
from .babi_stories import Excerpt
from .sources import find_file, held_out, hub_rows, is_hub, read_lines

HELD_OUT = 10
"""One in so many training stories is held out for validation."""

TASKS = [f"qa{number}" for number in range(1, 21)]
LIST = """
, . ? a above afraid after afternoon afterwards and antoine apple are back bathroom bedroom before below bernhard
bigger bill blue bored box brian carrying cat cats chest chocolate chocolates cinema color container daniel did
discarded do does down dropped e east either emily evening fit fits following football fred frog from garden gave
gertrude get give go got grabbed gray green greg hallway handed he how hungry in inside is jason jeff jessica john
journeyed julie julius kitchen left lily lion longer many mary maybe mice milk morning mouse moved n no none north not
nothing objects of office one or pajamas park passed picked pink put received rectangle red rhino right s sandra
school she sheep south sphere square suitcase sumit swan than that the then there they thirsty this three tired to
took travelled triangle two up w was went west what where white who why will winona wolf wolves yann yellow yes
yesterday you
"""
WORDS = LIST.split()
"""All words of the training files of v1.1, in small letters. They are fixed, so that all copies of the data have the
same tokens."""
NUMBER = r"\s*\d+\s+"
"""The beginning of a line of the official format."""
QUESTION = re.compile(rf"(?:{NUMBER})?\s*([^.!?\t]+\?)\s*\t\s*([\w, ]*\w)\s*(?:\t[\d\s]*)?")
"""A question of the official format, with its answer and the numbers of the supporting lines."""


def task_names(tasks: str | int | list[str | int]) -> list[str]:
    """Return the names of tasks, which may be given as numbers: 1, "1,4", ["qa1", 4]."""
    given = tasks.split(",") if isinstance(tasks, str) else tasks if isinstance(tasks, list) else [tasks]
    names = [f"qa{str(name).strip().removeprefix('qa')}" for name in given]
    for name in names:
        if name not in TASKS:
            raise unknown("bAbI task", name, TASKS)
    if not names or len(set(names)) < len(names):
        raise GradmemError(f"`tasks` must name each task once, as 'qa1,qa4', not {tasks!r}")
    return names


def find_stories(data: str, task: str, split: str) -> Path:
    """Find the file of a task and a split in a directory.

    Raises
    ------
    GradmemError
        If there is no such file, or more than one.
    """
    return find_file(Path(data), f"{task}_*_{'test' if split == 'test' else 'train'}.txt", task)


def read_excerpts(data: str, task: str, split: str, check: Callable[[str], object]) -> list[Excerpt]:
    """Read all contexts of a split of a task, each with its questions.

    Each story gives a context in turn, the first its first, the second its second, and so on: neighbours are of
    different stories, and the first few contexts are as long as all of them.

    Parameters
    ----------
    data : str
        Directory of official files, or a data set of the hub.
    task : str
        "qa1" to "qa20".
    split : {"train", "valid", "test"}
    check : callable
        Raises `GradmemError` for a sentence with unknown words.
    """
    if is_hub(data):
        rows = hub_rows(data, "test" if split == "test" else "train", f"en-{task}")
        source, lines = f"{data} {task}", lines_of_hub(rows)
    else:
        file = find_stories(data, task, split)
        source, lines = str(file), read_lines(file)
    stories = list(read_stories(lines, source, check))
    train = len(stories) - held_out(len(stories), HELD_OUT)
    mine = {"train": stories[:train], "valid": stories[train:], "test": stories}[split]
    longest = max(map(len, mine), default=0)
    return [
        story[(point + number) % len(story)]
        for point in range(longest)
        for number, story in enumerate(mine)
        if point < len(story)
    ]


def read_stories(
    lines: Iterable[tuple[int, str]], source: str, check: Callable[[str], object]
) -> Iterator[list[Excerpt]]:
    """Parse the official format: for each story, its excerpts.

    Parameters
    ----------
    lines : iterable of tuple of int and str
        Numbered lines.
    source : str
        Name of the file in error messages.
    check : callable
        Raises `GradmemError` for a sentence with unknown words.

    Raises
    ------
    GradmemError
        If a line is neither a statement nor a question, has a wrong number or an unknown word.
    """
    story: list[Excerpt] = []
    statements: list[str] = []
    before = 0
    for number, line in lines:
        shown, _, rest = line.lstrip().partition(" ")
        parts = [part.strip() for part in rest.split("\t")]
        if shown not in ("1", str(before + 1)) or not all(parts[:2]):
            raise GradmemError(
                f"{source} line {number} is not in the format of bAbI: '{line[:60]}'. A line has a number that counts "
                "up from 1, a sentence, and after a question a tab and the answer"
            )
        try:
            for part in parts[:2]:
                check(part)
        except GradmemError as error:
            raise GradmemError(f"{source} line {number}: {error}") from error
        before = int(shown)
        if before == 1:
            if story:
                yield story
            story, statements = [], []
        if len(parts) == 1:
            statements.append(parts[0])
        elif story and len(story[-1].statements) == len(statements):
            story[-1].questions.append((parts[0], parts[1]))
        else:
            story.append(Excerpt(list(statements), [(parts[0], parts[1])]))
    if story:
        yield story


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token for each word of bAbI, in small letters, and for `,`, `.` and `?`."""
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[END]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\w']+|[^\w\s]"), "removed", invert=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]")


def lines_of_hub(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[int, str]]:
    """Turn stories of facebook/babi_qa into numbered lines of the official format."""
    number = 0
    for row in rows:
        story = row["story"]
        for shown, text, answer in zip(story["id"], story["text"], story["answer"], strict=True):
            number += 1
            yield number, f"{shown} {text}\t{answer}" if answer else f"{shown} {text}"


def describe_overlap(known: list[Excerpt], test: list[Excerpt]) -> str:
    """Say how many test contexts, alone and with their questions, are in the training files word for word."""
    contexts = {tuple(one.statements) for one in known}
    questions = {(tuple(one.statements), question) for one in known for question in one.questions}
    asked = [(tuple(one.statements), question) for one in test for question in one.questions]
    return (
        f"{sum(tuple(one.statements) in contexts for one in test)} of {len(test)} test contexts occur word for word in "
        f"the training files, and {sum(one in questions for one in asked)} of {len(asked)} with the same question"
    )
