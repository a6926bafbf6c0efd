"""Questions on paragraphs from several sets of files, mixed by weight, and cloze questions on plain text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..batch import Batch
from ..data import Query, Sample, Samples, cached, collate, digest_files, split_indices
from ..data.paragraphs import (
    MAX_REPEATS,
    NGRAM,
    Overlap,
    Window,
    cloze_questions,
    drop_repeats,
    merge_documents,
    read_documents,
    split_into_windows,
)
from ..data.sources import held_out
from ..data.squad_files import read_rows
from ..errors import GradmemError, require
from ..pretrained import digest_tokenizer
from .base import WRITTEN, Split
from .squad import PROMPT, Squad

HELD_OUT = 20
"""One in so many documents of the first entry is held out for validation."""
CLOZE = 5
"""Questions of each training context; where the data has fewer, cloze questions are added."""
POOL = 512
"""Training contexts that are sorted by length together, so that the contexts of a batch are of similar length."""
SLOTS = 1000
"""Training contexts within which each entry has exactly its share."""


class QA(Squad):
    """Questions on paragraphs, mixed from several sets of files.

    A context is a whole paragraph, a part of a longer one, or several short ones in a row that are merged. A part is
    asked the questions whose answer occurs in it and nowhere else in the paragraph. Text files get cloze questions:
    words with a gap, and words whose next words are asked for. Validation takes one in twenty documents of the first
    entry.

    Parameters
    ----------
    tokenizer : str
        Hub name, directory or GGUF file of a pretrained tokenizer.
    data : str, optional
        Directory of all files; or one file, whose questions are the test split. Required to train and to evaluate.
        The test split of a directory is its `dev*` file.
    mix : dict of float, optional
        What to train on: patterns of files below `data`, each with its share of the contexts. Files are JSON in SQuAD's
        form, JSON lines with `context` and `qas` (or `question` and `answers`), or text (`.txt`).
    merge : list of str, optional
        Patterns of `mix` whose contexts are single sentences: neighbours are merged into longer contexts.
    decontaminate : list of str, optional
        Test files below `data`. Training contexts that share eight words in a row, or the title, with one of them are
        left out; a note says how many.
    max_context : int
        Most tokens of a training context. Longer texts are cut into chunks of this size.
    max_query : int
        Most tokens of a training question with its answer. All rows of a batch are as long as its longest one.
    questions : int
        Most questions of a training context in one batch; when the context comes again, others are drawn.
    max_words, answer_length
        As for `squad`.
    """

    def __init__(
        self,
        tokenizer: str,
        data: str | None = None,
        mix: dict[str, float] | None = None,
        merge: list[str] | None = None,
        decontaminate: list[str] | None = None,
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
        self.mix, self.merge, self.decontaminate = dict(mix or {}), list(merge or []), list(decontaminate or [])
        self.longest = self.chunk_size = max_context
        self.max_query, self.questions = max_query, questions
        self._pooled: dict[tuple[int, int, int], list[tuple[int, int, int]]] = {}

    @property
    def label(self) -> str:
        """Name of the task, with the limit on words."""
        return f"questions (up to {self.max_words} words)" if self.max_words else "questions"

    def load(self, split: Split) -> Samples:
        """Read the test split, or the held-out part of the first entry for validation."""
        if self.data is None:
            raise GradmemError("qa needs `data`: a directory of files to train on, or one file to evaluate on")
        if split == "test":
            return self._tests(Path(self.data)) if Path(self.data).is_file() else super().load(split)
        return self._entries("valid")[0]

    def samples(self, split: Split) -> Samples:
        """The samples of validation or test. Those of training are in `parts`."""
        if split == "train":
            raise GradmemError("the training samples of qa are in `parts`, one for each entry of `mix`")
        return super().samples(split)

    @cached_property
    def parts(self) -> list[Samples]:
        """Training samples of each entry of `mix`, read at first use."""
        return self._entries("train")

    def size(self, split: Split) -> int | None:
        """Number of contexts in a split."""
        return sum(map(len, self.parts)) if split == "train" else super().size(split)

    def notes(self, split: Split) -> list[str]:
        """What was cut or left out."""
        return [note for part in self.parts for note in part.notes] if split == "train" else super().notes(split)

    def batch(self, split: Split, start: int, size: int, seed: int = 0) -> Batch:
        """Samples of a split. Training mixes the entries by their weights; a batch has contexts of similar length."""
        if split != "train":
            return super().batch(split, start, size, seed)
        samples = []
        for position in range(start, start + size):
            entry, index, number = self._pool(position // POOL, size, seed)[position % POOL]
            part = self.parts[entry]
            first, last = part.span("queries_end", index)
            draw = random.Random(f"{seed} {number}")
            chosen = draw.sample(range(first, last), min(self.questions, last - first))
            samples.append(Sample(part.tokens("context", index), [part.query(query) for query in sorted(chosen)]))
        return collate(samples, self.pad_id)

    def calibration_size(self, split: Split) -> int | None:
        """Number of contexts that `calibration` has."""
        return len(self._calibrated(split)[1])

    def calibration(self, split: Split, start: int, size: int, seed: int = 0) -> dict[str, Batch]:
        """Contexts of the validation split, or of `data` if that is one file, to fit when to abstain.

        Four fifths are to fit on, the others to measure on. Nothing of a directory's test split is used.
        """
        samples, order = self._calibrated(split)
        batch = collate([samples[int(i)] for i in order[start : start + size]], self.pad_id)
        return {WRITTEN: batch, **self.unanswerable(batch)}

    def _calibrated(self, split: Split) -> tuple[Samples, np.ndarray]:
        """Samples, and which of them `calibration` has in a split."""
        samples = self.samples("test" if self.data is not None and Path(self.data).is_file() else "valid")
        order, fitted = _shuffled(len(samples), 0, 0), len(samples) * 4 // 5
        return samples, order[:fitted] if split == "valid" else order[fitted:]

    def _pool(self, number: int, size: int, seed: int) -> list[tuple[int, int, int]]:
        """Entry, index and number of `POOL` training contexts, in batches of `size` of similar length."""
        key = (number, size, seed)
        if key not in self._pooled:
            self._pooled = {key: self._draw_pool(*key)}
        return self._pooled[key]

    def _draw_pool(self, number: int, size: int, seed: int) -> list[tuple[int, int, int]]:
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
                chosen += [(entry, i, number * POOL + int(at)) for i, at in zip(found, mine, strict=True)]
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
        """Training samples of all entries; or validation samples, which are of the first entry alone."""
        if self.data is None or not self.mix:
            raise GradmemError("to train, qa needs `data`, a directory, and `mix`, the files in it to train on")
        directory = Path(self.data)
        tests = [directory / name for name in self.decontaminate]
        about: dict[str, Any] = {"task": "qa", "tokenizer": digest_tokenizer(self.tokenizer), "prompt": PROMPT}
        about |= {"limits": [self.longest, self.max_query, self.answer_length, HELD_OUT, MAX_REPEATS, CLOZE, NGRAM]}
        about |= {"decontaminate": digest_files(tests), "split": split}
        overlaps: list[Overlap] = []  # read once, and only if an entry is not in the cache
        found = []
        for number, pattern in enumerate(list(self.mix) if split == "train" else list(self.mix)[:1]):
            files = sorted(directory.glob(pattern))
            if not files:
                raise GradmemError(f"no file in {directory} matches the pattern {pattern} of `mix`")

            def make(pattern: str = pattern, files: list[Path] = files, first: bool = not number) -> Samples:
                overlaps[:] = overlaps or [Overlap.with_files(tests)]
                return self._build(pattern, files, overlaps[0], split, first)

            own = {"files": digest_files(files), "merge": pattern in self.merge, "first": not number}
            found.append(cached(about | own, make))
        return found

    def _build(self, pattern: str, files: list[Path], overlap: Overlap, split: Split, first: bool) -> Samples:
        notes: list[str] = []
        documents = [document for file in files for document in read_documents(file, overlap, notes)]
        held = held_out(len(documents), HELD_OUT) if first else 0
        documents = documents[held:] if split == "train" else documents[:held]
        if dropped := drop_repeats(documents):
            notes.append(
                f"{dropped} questions of {pattern} are left out: they repeat one question more than {MAX_REPEATS} times"
            )
        if pattern in self.merge:
            documents = [merge_documents(documents)]
        lengths = iter(map(len, self._encode_all([unit for document in documents for unit in document.units])))
        windows = []
        for document in documents:
            sizes = [next(lengths) for _ in document.units]
            windows += list(split_into_windows(document, sizes, self.longest, pattern in self.merge))
        clean = [window for window in windows if not overlap.has(window[0])]
        if len(clean) < len(windows):
            notes.append(
                f"{len(windows) - len(clean)} of {len(windows)} contexts are left out: they overlap with the test files"
            )
        if split == "train":
            clean = [(text, [*asked, *cloze_questions(text, CLOZE - len(asked))]) for text, asked in clean]
        return self._tokenize_all(clean, notes, split == "train")

    def _tokenize_all(self, windows: list[Window], notes: list[str], train: bool) -> Samples:
        """Make samples of contexts and questions, and leave out questions that are too long."""
        contexts = self._encode_all([text for text, _ in windows])
        rows = [(self.query_text(question), answers) for _, asked in windows for question, answers in asked]
        prompts = self._encode_all([prompt for prompt, _ in rows])
        wholes = self._encode_all([f"{prompt} {answers[0].strip()}" for prompt, answers in rows])
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

    def _encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of many texts, many times faster than one by one."""
        if not texts:
            return []
        options = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
        ids: list[list[int]] = self.tokenizer(list(texts), **options, verbose=False).input_ids
        return ids


@lru_cache(maxsize=4)
def _shuffled(size: int, seed: int, number: int) -> np.ndarray:
    return np.random.default_rng([seed, number, size]).permutation(size)
