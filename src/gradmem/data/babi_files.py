"""Files of bAbI: the official format, and the words that stand in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..errors import GradmemError
from .babi_stories import Told

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
"""All words of the training files of v1.1, in small letters: fixed, so that a checkpoint reads any copy of the data."""
NUMBER = r"\s*\d+\s+"
"""What a line of the official format begins with."""
QUESTION = re.compile(rf"(?:{NUMBER})?\s*([^.!?\t]+\?)\s*\t\s*([\w, ]*\w)\s*(?:\t[\d\s]*)?")
"""A question of the official format, with its answer and the numbers of the lines that support it."""


def read_stories(lines: Iterable[tuple[int, str]], source: str, check: Callable[[str], object]) -> Iterator[list[Told]]:
    """Parse the official format: for each story, what is asked at each point.

    Parameters
    ----------
    lines : iterable of tuple of int and str
        Numbered lines.
    source : str
        What messages call the file.
    check : callable
        Raises `GradmemError` for a sentence with unknown words.

    Raises
    ------
    GradmemError
        At a line that is neither statement nor question, with a number out of turn, or with an unknown word.
    """
    story: list[Told] = []
    statements: list[str] = []
    before = 0
    for number, line in lines:
        shown, _, rest = line.lstrip().partition(" ")
        parts = [part.strip() for part in rest.split("\t")]
        if shown not in ("1", str(before + 1)) or not all(parts[:2]):
            raise GradmemError(
                f"{source} line {number} is not in the format of bAbI: '{line[:60]}'; it has a number that counts "
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
            story.append(Told(list(statements), [(parts[0], parts[1])]))
    if story:
        yield story


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of bAbI in small letters, and for comma, full stop and question mark."""
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[END]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\w']+|[^\w\s]"), "removed", invert=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]")


def hub_lines(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[int, str]]:
    """Stories of facebook/babi_qa as lines of the official format."""
    number = 0
    for row in rows:
        story = row["story"]
        for place, text, answer in zip(story["id"], story["text"], story["answer"], strict=True):
            number += 1
            yield number, f"{place} {text}\t{answer}" if answer else f"{place} {text}"
