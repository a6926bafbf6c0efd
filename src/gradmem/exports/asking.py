"""How to ask an exported memory of keys and values: token ids that stand for it, and the text around a question.

A server keeps keys and values by the token ids of a prompt. A memory has no text, so it gets ids of its own, made from
its contents: no other memory has the same, and a prompt never reads a memory that it does not name.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from ..errors import GradmemError, refused
from ..files import write_bytes
from ..memory import digest
from ..model import BoundMemory
from .keys_values import KeysValues

QUESTION = "GRADMEMQUESTION?"
"""A question, with the mark at its end that some tokenizers join to a line break behind it."""


def stand_ins(found: KeysValues, memory: BoundMemory) -> list[int]:
    """Token ids that stand for a memory in a prompt, one for each of its positions; none is a special token."""
    tokenizer = memory.model.task.tokenizer
    plain = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder))
    contents = digest({"keys": found.keys, "values": found.values})
    drawn = hashlib.shake_256(contents.encode()).digest(4 * found.entries)
    return [plain[number % len(plain)] for number in struct.unpack(f"<{found.entries}I", drawn)]


def prompt_ids(memory: BoundMemory, ids: list[int], question: str) -> list[int]:
    """Token ids of a whole prompt: those that stand for the memory, and those of a question.

    Parameters
    ----------
    memory : BoundMemory
    ids : list of int
        From `stand_ins`.
    question : str

    Raises
    ------
    GradmemError
        If the question is empty or too long, or has unknown characters.
    """
    return [*ids, *memory.model.encoder.query_ids(question, None, len(ids))]


def save_how_to_ask(memory: BoundMemory, ids: list[int], file: Path) -> Path:
    """Save beside an export what a client needs to ask it, as JSON.

    `memory` are the ids that stand for the memory at the beginning of a prompt, and `question` the two texts before and
    after a question; it is null if the model's tokenizer does not keep them apart from the question.

    Returns
    -------
    Path
        The file: the name of the export with `.json` behind it.
    """
    about: dict[str, Any] = {"model": memory.model.name, "memory": ids, "question": _around(memory)}
    return write_bytes(Path(f"{file}.json"), json.dumps(about).encode())


def prompt(file: Path, question: str) -> list[int | str]:
    """A prompt for `/completion` of llama.cpp's server, from the JSON beside an export: token ids and texts.

    The server reads the name of a special token in a text as this token: for questions of strangers use `prompt_ids`.

    Raises
    ------
    GradmemError
        If the file is missing or damaged, or it does not know the texts around a question.
    """
    with refused(f"{file} does not say how to ask an export"):
        about = json.loads(Path(file).read_bytes())
        ids, around = about["memory"], about["question"]
        if around is None:
            raise GradmemError(f"{file} does not know the text around a question: use `prompt_ids`")
        before, after = around
        return [*ids, before + question, *([after] if after else [])]


def _around(memory: BoundMemory) -> list[str] | None:
    """Texts before and after a question, if they and the question are tokenized apart."""
    task = memory.model.task
    ids = task.encode_query(QUESTION)
    before, found, after = task.text(ids).partition(QUESTION)
    apart = task.encode(before + QUESTION) + task.tokenizer(after, add_special_tokens=False).input_ids
    return [before, after] if found and apart == ids else None
