"""Files of questions on paragraphs: JSON in SQuAD's official form, and JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import GradmemError
from .sources import read_lines

Row = tuple[str, str, list[str]]
"""A paragraph, a question and all right answers to it."""


def read_rows(path: Path) -> Iterator[Row]:
    """Read the questions of a file.

    Parameters
    ----------
    path : Path
        JSON in SQuAD's official form; or, if its name ends in `.jsonl`, JSON lines: each holds one question, or one
        context with its questions in a list `qas`.

    Raises
    ------
    GradmemError
        If the file has another form; the message names the line or the paragraph.
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
        raise GradmemError(f"{path} is not a SQuAD file: it needs a list `data` of articles") from error
    for context, questions, where in _paragraphs(articles, path):
        for question in questions:
            yield _row({"context": context, **question}, where)


def rows_of_hub(rows: Iterable[Any]) -> Iterator[Row]:
    """Check the questions of a data set of the hub; the result is as that of `read_rows`."""
    for number, row in enumerate(rows, 1):
        yield _row(row, f"row {number}")


def read_titles(path: Path) -> dict[str, str]:
    """Return the title of each context of a file, in small letters: its `title`, or its `id` up to the first `#`."""
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for _, line in read_lines(path)]
    else:
        articles = json.loads("\n".join(line for _, line in read_lines(path)))["data"]
        rows = [
            {**paragraph, "title": article.get("title")} for article in articles for paragraph in article["paragraphs"]
        ]
    titles = {str(row["context"]): str(row.get("title") or row.get("id") or "") for row in rows}
    return {context: title.split("#")[0].replace("_", " ").strip().lower() for context, title in titles.items()}


def _questions(fields: Any, where: str) -> list[Any]:
    """The questions of a line, each with its context."""
    if not isinstance(fields, dict) or "qas" not in fields:
        return [fields]
    try:
        return [{**question, "context": fields.get("context")} for question in fields["qas"]]
    except TypeError as error:
        raise GradmemError(f"{where} is no context with questions: `qas` is a list of objects ({error})") from error


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
        raise GradmemError(f"{where} is no question: context, question and answers must be texts that are not empty")
    return context, question, texts
