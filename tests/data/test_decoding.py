"""Whatever tokens come next, the text that was shown of an answer is its beginning."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gradmem.tasks.babi import Babi
from gradmem.tasks.base import Task
from gradmem.tasks.kv import KV


class Said(Task):
    """A task of nothing but a tokenizer."""

    def __init__(self, words: list[str], decoder: Any, **options: Any) -> None:
        vocabulary = {word: i for i, word in enumerate(["[PAD]", "[END]", "[UNK]", *words])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.decoder = decoder
        named = {"pad_token": "[PAD]", "eos_token": "[END]", "unk_token": "[UNK]"}
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named, **options)
        self.answer_length = 8

    def batch(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError


class Shouted(Said):
    """One whose answers are rewritten, and which does not say how."""

    def answer_text(self, text: str) -> str:
        return text.title().replace("A B", "C")


WORDS = ["a", "b", ",", ".", "'", "s", "n't", "do"]
BYTES = [f"<0x{byte:02X}>" for byte in "é€".encode()] + ["▁a", "b", "▁"]
LLAMA = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
ALPHABET = ["Ã", "©", "â", "Ĥ", "¬", "a", "Ġb"]  # the bytes of é and €, as byte-level tokenizers write them
TASKS: dict[str, Any] = {
    "pairs": lambda: KV(pairs=3),
    "lists": lambda: Babi(tasks="qa8", data=None),
    "words": lambda: Said(WORDS, None),
    "words that are cleaned up": lambda: Said(WORDS, None, clean_up_tokenization_spaces=True),
    "pieces of words": lambda: Said([*WORDS, "##s", "##,"], decoders.WordPiece(cleanup=True)),
    "bytes": lambda: Said(ALPHABET, decoders.ByteLevel()),
    "bytes among words": lambda: Said(BYTES, LLAMA),
    "rewritten answers": lambda: Shouted(WORDS, None),
    "patterns": lambda: Said(WORDS, decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")])),
}
SHOWN = ("pairs", "words", "bytes", "bytes among words")
"""Those of which something is shown before the end."""


@pytest.mark.parametrize("kind", TASKS)
def test_what_is_shown_is_the_beginning_of_the_answer(kind: str) -> None:
    task, draw = TASKS[kind](), random.Random(0)
    early = False
    for _ in range(200):
        ids = draw.choices(range(len(task.tokenizer)), k=6)
        for end in range(1, len(ids) + 1):
            shown = task.settled(ids[:end])
            assert all(task.decode(ids[:more]).startswith(shown) for more in range(end, len(ids) + 1))
            early |= bool(shown) and task.end_id not in ids[:end]
            if task.end_id in ids[:end]:
                assert shown == task.decode(ids)
    assert early == (kind in SHOWN)
