"""SQuAD v1.1 (Rajpurkar et al., arXiv 1606.05250) and Short SQuAD: questions on a paragraph, answered from memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..batch import Batch
from ..data import Query, Sample, Samples, cached, digest_files
from ..data.sources import find_file, held_out, hub_rows, is_hub, read_lines
from ..errors import GradmemError
from ..pretrained import digest_tokenizer, pretrained_tokenizer
from .base import FileTask, Split

PROMPT = "\nQuestion: {}\nAnswer:"
HELD_OUT = 20
"""One in so many training paragraphs is held out for validation."""
Row = tuple[str, str, list[str]]
"""Paragraph, question and all its right answers."""


class Squad(FileTask):
    """A paragraph and all questions on it; the first reference answer is the target, any of them is right.

    Parameters
    ----------
    tokenizer : str
        Hub name, directory or GGUF file of a pretrained tokenizer.
    data : str, optional
        Directory with one `train*` and one `dev*` file, as JSON of the official form or as JSON lines with `context`,
        `question` and `answers`; or a data set of the hub in this form. Training and validation take the train file
        (a twentieth of its paragraphs is held out), test takes the dev file. Needed to train and to evaluate.
    max_words : int, optional
        Leave out paragraphs of more words (Short SQuAD).
    max_context : int, optional
        Most tokens of a context: longer ones lose their end, which is counted.
    answer_length : int
        Most tokens of an answer, its end included. Training leaves out questions whose target is longer, which is
        counted; evaluation asks them all.
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
        """The name, and the limit on words."""
        return f"short squad (up to {self.max_words} words)" if self.max_words else "squad"

    def source(self, split: Split) -> str:
        """The data."""
        return str(self.data)

    def load(self, split: Split) -> Samples:
        """Read a split, or take it from the cache."""
        if self.data is None:
            raise GradmemError("squad needs `data`: a directory with train and dev files, or a data set of the hub")
        about: dict[str, Any] = {"task": "squad", "split": split, "tokenizer": digest_tokenizer(self.tokenizer)}
        about |= {"limits": [self.max_words, self.max_context, self.answer_length], "prompt": PROMPT}
        about |= {"held_out": HELD_OUT}
        if is_hub(self.data):
            name = "validation" if split == "test" else "train"
            return cached(about | {"hub": self.data}, lambda: self._make(_plain(hub_rows(str(self.data), name)), split))
        file = find_file(Path(self.data), f"{'dev' if split == 'test' else 'train'}*.json*", split)
        return cached(about | {"files": digest_files([file])}, lambda: self._make(read_rows(file), split))

    def judge_generated(self, generated: list[list[int]], batch: Batch) -> dict[str, Tensor]:
        """Exact match and F1 as SQuAD defines them, the best over all references of a query."""
        try:
            from torchmetrics.functional.text import squad
        except ImportError as error:
            raise GradmemError("scoring SQuAD needs one more package: pip install 'gradmem[squad]'") from error
        found: dict[str, list[float]] = {"exact_match": [], "f1": []}
        for ids, references in zip(generated, batch.references, strict=True):
            guess = {"prediction_text": self.decode(ids), "id": "0"}
            truth = {"answers": {"text": references, "answer_start": [0] * len(references)}, "id": "0"}
            scores = squad([guess], [truth])
            for name, values in found.items():
                values.append(float(scores[name]) / 100)
        return {name: torch.tensor(values, dtype=torch.double) for name, values in found.items()}

    def context_text(self, text: str) -> str:
        """White space as in the data: none at the ends."""
        return text.strip()

    def query_text(self, text: str) -> str:
        """The question as the model was trained on it."""
        return PROMPT.format(text.strip()) if text.strip() else ""

    def answer_text(self, text: str) -> str:
        """White space as people expect it."""
        return text.strip()

    def settled(self, ids: list[int]) -> str:
        """White space is cut off at the ends only: the answer only grows."""
        return self._settled(ids)

    def _make(self, rows: Iterable[Row], split: Split) -> Samples:
        paragraphs: dict[str, list[tuple[str, list[str]]]] = {}
        for context, question, answers in rows:
            paragraphs.setdefault(self.context_text(context), []).append((question, answers))
        train = len(paragraphs) - held_out(len(paragraphs), HELD_OUT)
        parts = {"train": slice(train), "valid": slice(train, None), "test": slice(None)}
        mine = list(paragraphs.items())[parts[split]]
        notes: list[str] = []
        if self.max_words:
            short = [item for item in mine if len(item[0].split()) <= self.max_words]
            if len(short) < len(mine):
                dropped = f"{len(mine) - len(short)} of {len(mine)} {split} contexts"
                notes.append(f"{dropped} are left out: they have more than {self.max_words} words")
            mine = short
        return self._tokenized(mine, split, notes)

    def _tokenized(
        self, paragraphs: list[tuple[str, list[tuple[str, list[str]]]]], split: Split, notes: list[str]
    ) -> Samples:
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


def read_rows(path: Path) -> Iterator[Row]:
    """Questions of a file, JSON of the official form or JSON lines, of a question each or of a context with its `qas`.

    Raises
    ------
    GradmemError
        Where it is neither, naming the line or the paragraph.
    """
    if path.suffix == ".jsonl":
        for number, line in read_lines(path):
            where = f"{path} line {number}"
            try:
                fields = json.loads(line)
            except json.JSONDecodeError as error:
                raise GradmemError(f"{where} is not JSON: {error.msg} at column {error.colno}") from error
            yield from (_row(question, where) for question in _questions(fields, where))
        return
    try:
        articles = json.loads("\n".join(line for _, line in read_lines(path)))["data"]
    except json.JSONDecodeError as error:
        raise GradmemError(f"{path} line {error.lineno} is not JSON: {error.msg} at column {error.colno}") from error
    except (KeyError, TypeError) as error:
        raise GradmemError(f"{path} line 1 begins no SQuAD file: it needs a list `data` of articles") from error
    for article, paragraph, where in _paragraphs(articles, path):
        for question in paragraph:
            yield _row({"context": article, **question}, where)


def _questions(fields: Any, where: str) -> list[Any]:
    """The questions of a line, each with its context."""
    if not isinstance(fields, dict) or "qas" not in fields:
        return [fields]
    try:
        return [{**question, "context": fields.get("context")} for question in fields["qas"]]
    except TypeError as error:
        raise GradmemError(f"{where} is no context with questions: `qas` is a list of objects ({error})") from error


def read_titles(path: Path) -> dict[str, str]:
    """Title of each context of a file for `read_rows`, in small letters: `title`, or `id` up to its first `#`."""
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for _, line in read_lines(path)]
    else:
        articles = json.loads("\n".join(line for _, line in read_lines(path)))["data"]
        rows = [
            {**paragraph, "title": article.get("title")} for article in articles for paragraph in article["paragraphs"]
        ]
    titles = {str(row["context"]): str(row.get("title") or row.get("id") or "") for row in rows}
    return {context: title.split("#")[0].replace("_", " ").strip().lower() for context, title in titles.items()}


def _paragraphs(articles: Any, path: Path) -> Iterator[tuple[str, list[dict[str, Any]], str]]:
    where = str(path)
    try:
        for article in articles:
            for number, paragraph in enumerate(article["paragraphs"], 1):
                where = f"{path}, '{article.get('title', 'untitled')}', paragraph {number}"
                yield paragraph["context"], list(paragraph["qas"]), where
    except (KeyError, TypeError, AttributeError) as error:
        raise GradmemError(f"{where} is not in the format of SQuAD v1.1: {error}") from error


def _row(fields: Any, where: str) -> Row:
    """Check one question; `answers` may be texts, objects with a `text`, or one object with a list of texts."""
    try:
        context, question, answers = fields["context"], fields["question"], fields["answers"]
        answers = answers["text"] if isinstance(answers, dict) else answers
        texts = [answer["text"] if isinstance(answer, dict) else answer for answer in answers]
        good = bool(texts) and all(isinstance(text, str) and text.strip() for text in [context, question, *texts])
    except (KeyError, TypeError) as error:
        raise GradmemError(f"{where} is no question: it needs context, question and answers ({error})") from error
    if not good:
        raise GradmemError(f"{where} is no question: context, question or answers are empty or no text")
    return context, question, texts


def _plain(rows: Iterable[Any]) -> Iterator[Row]:
    for number, row in enumerate(rows, 1):
        yield _row(row, f"row {number}")
