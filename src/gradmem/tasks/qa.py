"""Questions on paragraphs from many files at once, mixed by weight, and cloze questions on plain text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..batch import Batch
from ..data import Query, Sample, Samples, cached, collate, digest_files, split_indices
from ..data.sources import held_out
from ..errors import GradmemError, require
from ..pretrained import digest_tokenizer
from ._paragraphs import GRAM, REPEATS, Apart, Window, cap, documents_of, gaps_in, joined, windows_of
from .base import Split
from .squad import PROMPT, Squad, read_rows

HELD_OUT = 20
"""One in so many documents of the first entry is held out for validation."""
CLOZE = 5
"""Questions that every training context has: where the data has fewer, gaps in the text make up for them."""
POOL = 512
"""Training contexts that are put in order of length, so that those of a batch are about as long."""
SLOTS = 1000
"""Contexts over which the weights of the entries are kept."""


class QA(Squad):
    """Questions on paragraphs, mixed from several sets of files.

    Contexts are whole paragraphs, windows of longer ones, or neighbouring short ones that are joined. A window is asked
    the questions whose answer stands in it and nowhere else in its paragraph. Text files have questions too: words
    with a gap, and words of which the next ones are wanted. Validation takes the first twentieth of the first entry.

    Parameters
    ----------
    tokenizer : str
        Hub name, directory or GGUF file of a pretrained tokenizer.
    data : str, optional
        Directory of all files; or one file, all questions of which are the test split. Needed to train and to
        evaluate. The test split of a directory is its `dev*` file.
    mix : dict of float, optional
        What to train on: patterns of files below `data`, each with its share of the contexts. Files are JSON as SQuAD
        has it, JSON lines with `context` and `qas` (or `question` and `answers`), or text (`.txt`).
    join : list of str, optional
        Those of the patterns whose neighbouring contexts are joined, as they are single sentences.
    apart : list of str, optional
        Files below `data` for tests only: training contexts that share eight words in a row with them, or their title,
        are left out, which is counted.
    max_context : int
        Most tokens of a training context.
    max_query : int
        Most tokens of a training question with its answer: all rows of a batch are as long as the longest.
    questions : int
        Most questions of a training context in one batch; others are drawn when it comes again.
    max_words, answer_length
        As for `squad`.
    """

    def __init__(
        self,
        tokenizer: str,
        data: str | None = None,
        mix: dict[str, float] | None = None,
        join: list[str] | None = None,
        apart: list[str] | None = None,
        max_context: int = 160,
        max_query: int = 48,
        questions: int = 8,
        max_words: int | None = None,
        answer_length: int = 32,
    ) -> None:
        super().__init__(tokenizer, data, max_words, None, answer_length)
        require("max_context", max_context, max_context >= 2, "at least 2")
        require("max_query", max_query, max_query >= 2, "at least 2")
        require("questions", questions, questions >= 1, "at least 1")
        shares = list(mix.values()) if isinstance(mix, dict) else [mix] if mix is not None else []
        good = all(isinstance(share, int | float) and share > 0 for share in shares)
        require("mix", mix, good, "patterns of files, each with a share above 0")
        self.mix, self.join, self.apart = dict(mix or {}), list(join or []), list(apart or [])
        self.longest, self.max_query, self.questions = max_context, max_query, questions
        self._pooled: dict[tuple[int, int, int], list[tuple[int, int, int]]] = {}

    @property
    def label(self) -> str:
        """The name, and the limit on words."""
        return f"questions (up to {self.max_words} words)" if self.max_words else "questions"

    def load(self, split: Split) -> Samples:
        """Read the test split, or the part of the first entry that is held out."""
        if self.data is None:
            raise GradmemError("qa needs `data`: a directory of files to train on, or one file to be asked")
        if split == "test":
            return self._tests(Path(self.data)) if Path(self.data).is_file() else super().load(split)
        return self._entries("valid")[0]

    def samples(self, split: Split) -> Samples:
        """The samples of validation or test; those of training are `parts`."""
        if split == "train":
            raise GradmemError("qa's training samples are those of several entries")
        return super().samples(split)

    @cached_property
    def parts(self) -> list[Samples]:
        """Training samples of each entry, which are read when they are first asked for."""
        return self._entries("train")

    def size(self, split: Split) -> int | None:
        """Contexts in a split."""
        return sum(map(len, self.parts)) if split == "train" else super().size(split)

    def notes(self, split: Split) -> list[str]:
        """What was cut or left out."""
        return [note for part in self.parts for note in part.notes] if split == "train" else super().notes(split)

    def batch(self, split: Split, start: int, size: int, seed: int = 0) -> Batch:
        """Samples of a split; in training of all entries by their weights, those of about a length together."""
        if split != "train":
            return super().batch(split, start, size, seed)
        samples = []
        for place in range(start, start + size):
            entry, index, number = self._pool(place // POOL, size, seed)[place % POOL]
            part = self.parts[entry]
            first, last = part.span("queries_end", index)
            draw = random.Random(f"{seed} {number}")
            chosen = draw.sample(range(first, last), min(self.questions, last - first))
            samples.append(Sample(part.tokens("context", index), [part.query(query) for query in sorted(chosen)]))
        return collate(samples, self.pad_id)

    def _pool(self, number: int, size: int, seed: int) -> list[tuple[int, int, int]]:
        """Entry, index and place of some training contexts, in batches of `size` of about equal lengths."""
        key = (number, size, seed)
        if key not in self._pooled:
            self._pooled = {key: self._drawn(*key)}
        return self._pooled[key]

    def _drawn(self, number: int, size: int, seed: int) -> list[tuple[int, int, int]]:
        parts = self.parts
        weights = np.array(list(self.mix.values()), dtype=float)
        ends = np.round(np.cumsum(weights) / weights.sum() * SLOTS).astype(int)
        slots = np.repeat(np.arange(len(weights)), np.diff(ends, prepend=0))
        turn, begin = divmod(number * POOL, SLOTS)
        count = -(-(begin + POOL) // SLOTS)
        order = np.concatenate([slots[_shuffled(SLOTS, seed, turn + more)] for more in range(count)])
        entries, chosen = order[begin : begin + POOL], list[tuple[int, int, int]]()
        for entry, part in enumerate(parts):
            mine = np.flatnonzero(entries == entry)
            before = turn * int((slots == entry).sum()) + int((order[:begin] == entry).sum())
            if len(mine):
                found = split_indices("train", before, len(mine), len(part), seed + entry).tolist()
                chosen += [(entry, i, number * POOL + int(place)) for i, place in zip(found, mine, strict=True)]
        chosen.sort(key=lambda one: (len(parts[one[0]].tokens("context", one[1])), one))
        batches = [chosen[at : at + size] for at in range(0, POOL, size)]
        full = POOL // size
        return [one for i in [*_shuffled(full, seed, number), *range(full, len(batches))] for one in batches[i]]

    def _tests(self, file: Path) -> Samples:
        about: dict[str, Any] = {
            "task": "squad",
            "split": "test",
            "tokenizer": digest_tokenizer(self.tokenizer),
            "prompt": PROMPT,
        }
        about |= {"limits": [self.max_words, None, self.answer_length], "files": digest_files([file])}
        return cached(about, lambda: self._make(read_rows(file), "test"))

    def _entries(self, split: Split) -> list[Samples]:
        """Samples of every entry for training; of the first one for validation."""
        if self.data is None or not self.mix:
            raise GradmemError("qa needs `data`, a directory, and `mix`, what of it to train on")
        directory = Path(self.data)
        apart = [directory / name for name in self.apart]
        about: dict[str, Any] = {"task": "qa", "tokenizer": digest_tokenizer(self.tokenizer), "prompt": PROMPT}
        about |= {"limits": [self.longest, self.max_query, self.answer_length, HELD_OUT, REPEATS, CLOZE, GRAM]}
        about |= {"apart": digest_files(apart), "split": split}
        known: list[Apart] = []
        found = []
        for number, pattern in enumerate(list(self.mix) if split == "train" else list(self.mix)[:1]):
            files = sorted(directory.glob(pattern))
            if not files:
                raise GradmemError(f"no file below {directory} is {pattern}")

            def make(pattern: str = pattern, files: list[Path] = files, first: bool = not number) -> Samples:
                known[:] = known or [Apart.read(apart)]
                return self._made(pattern, files, known[0], split, first)

            own = {"files": digest_files(files), "join": pattern in self.join, "first": not number}
            found.append(cached(about | own, make))
        return found

    def _made(self, pattern: str, files: list[Path], apart: Apart, split: Split, first: bool) -> Samples:
        notes: list[str] = []
        documents = [document for file in files for document in documents_of(file, apart, notes)]
        held = held_out(len(documents), HELD_OUT) if first else 0
        documents = documents[held:] if split == "train" else documents[:held]
        if dropped := cap(documents):
            notes.append(f"{dropped} questions of {pattern} are left out: they are asked more than {REPEATS} times")
        if pattern in self.join:
            documents = [joined(documents)]
        lengths = iter(map(len, self._encoded([unit for document in documents for unit in document.units])))
        windows = []
        for document in documents:
            sizes = [next(lengths) for _ in document.units]
            windows += list(windows_of(document, sizes, self.longest, pattern in self.join))
        clean = [window for window in windows if not apart.meets(window[0])]
        if len(clean) < len(windows):
            notes.append(
                f"{len(windows) - len(clean)} of {len(windows)} contexts are left out: the test files hold them"
            )
        if split == "train":
            clean = [(text, [*asked, *gaps_in(text, CLOZE - len(asked))]) for text, asked in clean]
        return self._sampled(clean, notes, split == "train")

    def _sampled(self, windows: list[Window], notes: list[str], train: bool) -> Samples:
        """Tokenize everything at once."""
        contexts = self._encoded([text for text, _ in windows])
        rows = [(self.query_text(question), answers) for _, asked in windows for question, answers in asked]
        prompts = self._encoded([prompt for prompt, _ in rows])
        wholes = self._encoded([f"{prompt} {answers[0].strip()}" for prompt, answers in rows])
        samples, queries, long = [], zip(prompts, wholes, rows, strict=True), 0
        for ids, (_, asked) in zip(contexts, windows, strict=True):
            kept = []
            for _ in asked:
                prompt, whole, (text, answers) = next(queries)
                if whole[: len(prompt)] != prompt:
                    prompt, target = self.encode_pair(text, " " + answers[0].strip())
                    whole = prompt + target[:-1]
                fits = len(whole) - len(prompt) < self.answer_length and len(whole) < self.max_query
                if fits or not train:
                    kept.append(Query([*whole, self.end_id], len(prompt), answers))
            long += len(asked) - len(kept)
            if kept and len(ids) > 1:
                samples.append(Sample(ids[: self.longest], kept))
        if long:
            notes.append(f"{long} of {len(rows)} questions or answers are too long and are left out")
        return Samples.build(samples, notes)

    def _encoded(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of many texts, which is many times faster than one by one."""
        if not texts:
            return []
        options = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
        ids: list[list[int]] = self.tokenizer(list(texts), **options, verbose=False).input_ids
        return ids


@lru_cache(maxsize=4)
def _shuffled(size: int, seed: int, number: int) -> np.ndarray:
    return np.random.default_rng([seed, number, size]).permutation(size)
