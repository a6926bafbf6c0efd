"""Associative retrieval of key-value pairs (paper, section 4.1)."""

from __future__ import annotations

import math
import re
import string
from functools import lru_cache

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ..batch import Batch, Tokens
from ..errors import GradmemError
from .base import OTHER_TEXTS, WRITTEN, Split, Task

CHARACTERS = string.ascii_letters + string.digits
"""Characters of keys and values."""
SPECIAL = ["[PAD]", "[UNK]"]
MARKS = "|!:?"
BLOCK = 256
"""Samples generated at once."""
SPLITS = {"train": 0, "valid": 1, "test": 2}


class KV(Task):
    """Contexts of N pairs `!kk:vv!` with a `|` at the end; queries `?!kk:` with targets `vv!|`.

    Parameters
    ----------
    pairs : int
        Pairs N of a context. Keys are unique, values may repeat.
    key_length, value_length : int
        Characters of a key and of a value.
    alphabet : int
        Number of different characters in keys and values, 2 to 62: the first of a-z, A-Z, 0-9.
    noise : float
        Share of the context that is random characters between the pairs, 0 to below 1.
    queries : int, optional
        Queries of each context, on different keys; by default all N.
    """

    def __init__(
        self,
        pairs: int = 32,
        key_length: int = 2,
        value_length: int = 2,
        alphabet: int = len(CHARACTERS),
        noise: float = 0.0,
        queries: int | None = None,
    ) -> None:
        if not 2 <= alphabet <= len(CHARACTERS):
            raise GradmemError(f"alphabet must be from 2 to {len(CHARACTERS)}, not {alphabet}")
        if min(key_length, value_length) < 1:
            raise GradmemError("key_length and value_length must be at least 1")
        if not 1 <= pairs <= alphabet**key_length // 2:
            raise GradmemError(f"pairs must be from 1 to {alphabet**key_length // 2}, not {pairs}")
        if not 0 <= noise < 1:
            raise GradmemError(f"noise must be from 0 to below 1, not {noise}")
        if queries is not None and not 1 <= queries <= pairs:
            raise GradmemError(f"queries must be from 1 to {pairs}, not {queries}")
        self.pairs, self.alphabet, self.queries = pairs, alphabet, queries
        self.key_length, self.value_length, self.noise = key_length, value_length, noise
        self.tokenizer = character_tokenizer()
        self._pair = re.compile(rf"!([{CHARACTERS}]{{{key_length}}}):([{CHARACTERS}]{{{value_length}}})!")
        self.answer_length = value_length + 2
        self.first = self._id(CHARACTERS[0])
        self._block = lru_cache(maxsize=4)(self._make_block)

    @property
    def label(self) -> str:
        """Number of pairs, and share of noise."""
        return f"{self.pairs} pairs" + (f", {self.noise:.0%} noise" if self.noise else "")

    @property
    def bits(self) -> float:
        """Information in a context, in bits: all characters of its keys and values."""
        return self.pairs * (self.key_length + self.value_length) * math.log2(self.alphabet)

    def batch(self, split: Split, start: int, size: int, seed: int = 0) -> Batch:
        """Samples `start` to `start + size`; see `Task.batch`."""
        wanted = np.arange(start, start + size)
        contexts, keys, values = (
            np.concatenate(parts)
            for parts in zip(
                *(
                    tuple(part[wanted[wanted // BLOCK == block] % BLOCK] for part in self._block(split, seed, block))
                    for block in range(start // BLOCK, (start + size - 1) // BLOCK + 1)
                ),
                strict=True,
            )
        )
        asked = keys.shape[1]
        rows = np.concatenate(
            [
                self._fill((size, asked, 2), "?!"),
                keys,
                self._fill((size, asked, 1), ":"),
                values,
                self._fill((size, asked, 2), "!|"),
            ],
            axis=2,
        ).reshape(size * asked, -1)
        queries = torch.from_numpy(rows)
        labels = queries.clone()
        labels[:, : self.key_length + 3] = -100
        ids = torch.from_numpy(contexts)
        return Batch(
            Tokens(ids, torch.ones_like(ids, dtype=torch.bool)),
            Tokens(queries, torch.ones_like(queries, dtype=torch.bool)),
            labels,
            torch.arange(size).repeat_interleave(asked),
        )

    def unanswerable(self, batch: Batch) -> dict[str, Batch]:
        """Two kinds of absent keys: keys of the next context, and keys of this one with another last character.

        Raises
        ------
        GradmemError
            If a context has all keys that differ from one of its keys in the last character only.
        """
        colons = batch.context.ids == self._id(":")
        number = torch.arange(batch.context.ids.shape[1]).to(colons.device) - self.key_length
        present = [
            {tuple(ids[start : start + self.key_length].tolist()) for start in number[at]}
            for ids, at in zip(batch.context.ids, colons, strict=True)
        ]
        key_slice = slice(2, 2 + self.key_length)

        def absent(keys: Tensor, rows: Tensor) -> Batch:
            """The queries with these keys, whose last character is changed until their context does not have them."""
            queries = batch.queries.ids.clone()
            for i, (key, row) in enumerate(zip(keys.tolist(), rows.tolist(), strict=True)):
                last = key[-1] - self.first
                others = ([*key[:-1], self.first + (last + step) % self.alphabet] for step in range(self.alphabet))
                free = next((other for other in others if tuple(other) not in present[row]), None)
                if free is None:
                    raise GradmemError("some contexts have all keys that differ in the last character: use fewer pairs")
                queries[i, key_slice] = torch.tensor(free)
            return Batch(batch.context, Tokens(queries, batch.queries.mask), batch.labels, rows)

        keys = batch.queries.ids[:, key_slice]
        return {
            "of another context": absent(keys, (batch.rows + 1) % len(batch.context)),
            "one character off": absent(keys, batch.rows),
        }

    def calibration(self, split: Split, start: int, size: int, seed: int = 0) -> dict[str, Batch]:
        """Contexts of N pairs and of fewer (N/2, N/4 and so on), by turns: users write texts of any length."""
        fewer = self.pairs >> start // size % self.pairs.bit_length()
        task = KV(fewer, self.key_length, self.value_length, self.alphabet, self.noise)
        batch = task.batch(split, start, size, seed)
        return {WRITTEN: batch, **task.unanswerable(batch)}

    def statement(self, query: str, answer: str) -> str:
        """Return the pair `!kk:vv!`."""
        return f"{query[1:]}{answer}!"

    def scored(self, labels: Tensor) -> Tensor:
        """Exact match does not count `!` and `|`."""
        return (labels != -100) & (labels != self._id("!")) & (labels != self._id("|"))

    def may_end(self, ids: Tensor) -> Tensor:
        """A chunk may end after a pair, but not before the `|` at the end."""
        marks = ids == self._id("!")
        closing = marks & (marks.cumsum(1) % 2 == 0)
        closing[:, :-1] &= ids[:, 1:] != self._id("|")
        return closing

    def context_text(self, text: str) -> str:
        """Accept the exact format, or lines `key:value`."""
        if found := self._pair.findall(text):
            if twice := next((key for key, value in found if dict(found)[key] != value), None):
                raise GradmemError(f"the key '{twice}' occurs twice, with two values: give each key once")
            return text.strip().removesuffix("|") + "|"
        pairs = "".join(f"!{key}:{value}!" for key, value in self._lines(text))
        return pairs + "|" if pairs else ""

    def query_text(self, text: str) -> str:
        """Accept a key, or the exact format `?!kk:`."""
        key = text[2:-1] if text.startswith("?!") and text.endswith(":") else text
        if len(key) != self.key_length or not set(key) <= set(CHARACTERS):
            raise GradmemError(
                f"{text!r} is no query: ask for a key of {self.key_length} letters or digits, "
                f"as '{CHARACTERS[: self.key_length]}' or '?!{CHARACTERS[: self.key_length]}:'"
            )
        return f"?!{key}:"

    def target(self, query: str, answer: str) -> tuple[list[int], list[int]]:
        """`?!kk:` and `vv!|`."""
        return self.encode(self.query_text(query)), self.encode(f"{answer}!|")

    def answer_text(self, text: str) -> str:
        """Return the value: everything but `!` and `|`."""
        return text.replace("!", "").replace("|", "")

    def settled(self, ids: list[int]) -> str:
        """Marks are removed wherever they are, so the value never changes at its beginning."""
        return self._settled(ids)

    def examples(self, text: str) -> list[tuple[str, str]]:
        """Return every key with its value."""
        return self._pair.findall(text) or self._lines(text)

    def example(self, seed: int = 0) -> tuple[str, list[tuple[str, str]]]:
        """The pairs of a test context, one on each line."""
        pairs = self.examples(self.text(self.batch("test", 0, 1, seed).context.ids[0].tolist()))
        return "\n".join(f"{key}:{value}" for key, value in pairs), pairs

    def _lines(self, text: str) -> list[tuple[str, str]]:
        pairs: dict[str, str] = {}
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            key, colon, value = (part.strip() for part in line.partition(":"))
            good = bool(colon) and len(key) == self.key_length and len(value) == self.value_length
            if not good or not set(key + value) <= set(CHARACTERS):
                raise GradmemError(
                    f"line {number} {line.strip()[:40]!r} is no pair: write key:value with {self.key_length} and "
                    f"{self.value_length} letters or digits, as 'a7:Qz'; {OTHER_TEXTS}"
                )
            if key in pairs:
                raise GradmemError(f"line {number}: the key '{key}' occurs twice; give each key once")
            pairs[key] = value
        return list(pairs.items())

    def _id(self, token: str) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(token))

    def _fill(self, shape: tuple[int, int, int], text: str) -> np.ndarray:
        return np.broadcast_to(np.array([self._id(c) for c in text], dtype=np.int64), shape)

    def _characters(self, numbers: np.ndarray, length: int) -> np.ndarray:
        """Turn numbers below alphabet^length into token ids, with one more axis of size `length`."""
        digits = numbers[..., None] // self.alphabet ** np.arange(length)[::-1] % self.alphabet
        return digits + self.first

    def _make_block(self, split: Split, seed: int, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Generate `BLOCK` samples: context ids (256, S), keys of the queries (256, Q, key_length) and their values."""
        random = np.random.default_rng([SPLITS[split], seed, block])
        keys = self._characters(distinct(random, BLOCK, self.pairs, self.alphabet**self.key_length), self.key_length)
        values = random.integers(self.alphabet, size=(BLOCK, self.pairs, self.value_length)) + self.first
        one = (BLOCK, self.pairs, 1)
        pairs = np.concatenate([self._fill(one, "!"), keys, self._fill(one, ":"), values, self._fill(one, "!")], axis=2)
        contexts = np.concatenate(
            [self._add_noise(random, pairs.reshape(BLOCK, -1)), self._fill((BLOCK, 1, 1), "|")[..., 0]],
            axis=1,
        )
        if self.queries is not None:
            asked = random.random((BLOCK, self.pairs)).argsort(1)[:, : self.queries, None]
            keys, values = np.take_along_axis(keys, asked, 1), np.take_along_axis(values, asked, 1)
        return contexts, keys, values

    def _add_noise(self, random: np.random.Generator, pairs: np.ndarray) -> np.ndarray:
        """Put random characters between the pairs, so that they are a share `noise` of the context."""
        length = pairs.shape[1]
        count = round(length * self.noise / (1 - self.noise))
        if not count:
            return pairs
        gaps = random.integers(self.pairs + 1, size=(BLOCK, count))
        # Sort by position: all characters of pair p have 2p + 1, noise in gap g has 2g.
        position = np.concatenate(
            [np.arange(length) // (length // self.pairs) * 2 + 1 + np.zeros_like(pairs), gaps * 2], 1
        )
        noise = random.integers(self.alphabet, size=(BLOCK, count)) + self.first
        order = position.argsort(axis=1, kind="stable")
        return np.take_along_axis(np.concatenate([pairs, noise], axis=1), order, 1)


def distinct(random: np.random.Generator, rows: int, count: int, below: int) -> np.ndarray:
    """Draw rows of `count` distinct numbers from 0 to below `below`; every set is equally likely.

    Repeats are drawn again until there are none.
    """
    numbers = random.integers(below, size=(rows, count))
    while True:
        order = numbers.argsort(axis=1, kind="stable")
        ranked = np.take_along_axis(numbers, order, 1)
        repeats = np.zeros_like(numbers, dtype=bool)
        np.put_along_axis(repeats, order[:, 1:], ranked[:, 1:] == ranked[:, :-1], 1)
        if not repeats.any():
            return numbers
        numbers[repeats] = random.integers(below, size=int(repeats.sum()))


def character_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token for each letter and digit and for the marks `|!:?`."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *MARKS, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="|")
