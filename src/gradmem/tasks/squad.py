"""SQuAD v1.1 (Rajpurkar et al., arXiv 1606.05250) and Short SQuAD: questions on a paragraph."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..batch import Batch
from ..data import Query, Sample, Samples, cached, digest_files
from ..data.paragraphs import Question, Window
from ..data.sources import find_file, held_out, hub_rows, is_hub
from ..data.squad_files import Row, read_rows, rows_of_hub
from ..data.squad_scores import exact_match_and_f1
from ..errors import GradmemError
from ..pretrained import digest_tokenizer, pretrained_tokenizer
from .base import FileTask, Split

PROMPT = "\nQuestion: {}\nAnswer:"
HELD_OUT = 20
"""One in so many training paragraphs is held out for validation."""


class Squad(FileTask):
    """A paragraph and all questions on it.

    The target is the first reference answer. Evaluation generates answers and accepts any reference.

    Parameters
    ----------
    tokenizer : str
        Hub name, directory or GGUF file of a pretrained tokenizer.
    data : str, optional
        Directory with one `train*` and one `dev*` file, as JSON of the official form or as JSON lines with `context`,
        `question` and `answers`; or a data set of the hub in this form. The train file is for training and validation
        (one in twenty of its paragraphs); the dev file is the test split. Required to train and to evaluate.
    max_words : int, optional
        Most words of a paragraph; longer ones are left out (Short SQuAD).
    max_context : int, optional
        Most tokens of a context. Longer ones are cut at the end; a note says how many.
    answer_length : int
        Most tokens of an answer, with its end token. Training leaves out questions with longer targets, and a note
        says how many; evaluation asks them all.
    """

    reads = False
    generates = True

    def __init__(
        self,
        tokenizer: str,
        data: str | None = None,
        max_words: int | None = None,
        max_context: int | None = None,
        answer_length: int = 32,
    ) -> None:
        super().__init__()
        limits = {"max_words": max_words, "max_context": max_context, "answer_length": answer_length}
        for name, limit in limits.items():
            if limit is not None and limit < 2:
                raise GradmemError(f"{name} must be at least 2, not {limit}")
        self.data, self.max_words, self.max_context, self.answer_length = data, max_words, max_context, answer_length
        self.tokenizer = pretrained_tokenizer(tokenizer)

    @property
    def label(self) -> str:
        """Name of the task, with the limit on words."""
        return f"short squad (up to {self.max_words} words)" if self.max_words else "squad"

    def source(self, split: Split) -> str:
        """The name of the data."""
        return str(self.data)

    def load(self, split: Split) -> Samples:
        """Read a split from its file, or from the cache."""
        if self.data is None:
            raise GradmemError("squad needs `data`: a directory with train and dev files, or a data set of the hub")
        about: dict[str, Any] = {"task": "squad", "split": split, "tokenizer": digest_tokenizer(self.tokenizer)}
        about |= {"limits": [self.max_words, self.max_context, self.answer_length], "prompt": PROMPT}
        about |= {"held_out": HELD_OUT}
        if is_hub(self.data):
            name = "validation" if split == "test" else "train"
            rows = hub_rows(self.data, name)
            return cached(about | {"hub": self.data}, lambda: self._make(rows_of_hub(rows), split))
        file = find_file(Path(self.data), f"{'dev' if split == 'test' else 'train'}*.json*", split)
        return cached(about | {"files": digest_files([file])}, lambda: self._make(read_rows(file), split))

    def judge_generated(self, generated: list[list[int]], batch: Batch) -> dict[str, Tensor]:
        """Exact match and F1 as SQuAD defines them: for each query the best over its references."""
        answers = [self.decode(ids) for ids in generated]
        scores = torch.tensor(
            [exact_match_and_f1(*pair) for pair in zip(answers, batch.references, strict=True)], dtype=torch.double
        )
        return dict(zip(("exact_match", "f1"), scores.T, strict=True))

    def right(self, answer: str, wanted: str, references: list[str]) -> bool:
        """Whether an answer is one of the references, as SQuAD compares them."""
        return bool(exact_match_and_f1(answer, references)[0])

    def context_text(self, text: str) -> str:
        """Remove white space at the ends, as in the training data."""
        return text.strip()

    def query_text(self, text: str) -> str:
        """Put the question into the prompt of the training data."""
        return PROMPT.format(text.strip()) if text.strip() else ""

    def answer_text(self, text: str) -> str:
        """Remove white space at the ends."""
        return text.strip()

    def settled(self, ids: list[int]) -> str:
        """What `answer_text` returns never changes at its beginning as tokens are added."""
        return self._settled(ids)

    def _make(self, rows: Iterable[Row], split: Split) -> Samples:
        paragraphs: dict[str, list[Question]] = {}
        for context, question, answers in rows:
            paragraphs.setdefault(self.context_text(context), []).append((question, answers))
        train = len(paragraphs) - held_out(len(paragraphs), HELD_OUT)
        parts = {"train": slice(train), "valid": slice(train, None), "test": slice(None)}
        mine = list(paragraphs.items())[parts[split]]
        notes: list[str] = []
        if self.max_words:
            short = [item for item in mine if len(item[0].split()) <= self.max_words]
            if len(short) < len(mine):
                left_out = f"{len(mine) - len(short)} of {len(mine)} {split} contexts"
                notes.append(f"{left_out} are left out: they have more than {self.max_words} words")
            mine = short
        return self._tokenize(mine, split, notes)

    def _tokenize(self, paragraphs: list[Window], split: Split, notes: list[str]) -> Samples:
        cut = lost = long = asked = 0
        samples = []
        for context, questions in paragraphs:
            ids, limit = self.encode(context), self.max_context
            kept = context
            if limit is not None and len(ids) > limit:
                ids, cut = ids[:limit], cut + 1
                kept = "".join(self.pieces(context)[:limit])
            queries = []
            for question, answers in questions:
                asked += 1
                lost += not any(answer in kept for answer in answers)
                prompt, target = self.encode_pair(self.query_text(question), " " + answers[0].strip())
                if len(target) > self.answer_length:
                    long += 1
                    if split == "train":
                        continue
                queries.append(Query([*prompt, *target], len(prompt), answers))
            if queries:
                samples.append(Sample(ids, queries))
        if cut:
            notes.append(
                f"the end of {cut} of {len(paragraphs)} {split} contexts is left out, to keep to {self.max_context} "
                f"tokens; {lost} of {asked} questions have no answer in what is left"
            )
        if long:
            what = "left out" if split == "train" else "asked, but cannot be answered whole"
            notes.append(
                f"{long} of {asked} {split} targets are longer than {self.answer_length} tokens and are {what}"
            )
        return Samples.build(samples, notes)
