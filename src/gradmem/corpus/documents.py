"""The documents of a corpus: a folder of text files, JSON lines or Parquet, wherever fsspec finds them."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import IO, Any

from ..errors import GradmemError, reason
from ..receipts import text_digest
from ..visible import visible

LARGEST = 2**26
"""Most bytes of a document."""
FILES_AT_ONCE = 256
"""Text files that one task reads."""
ROWS_AT_ONCE = 256
"""Rows of a Parquet file that are in memory at once."""
LONGEST_TAG = 100
JSON_LINES, PARQUET = (".jsonl", ".ndjson"), (".parquet",)
OWN_FIELDS = ("id", "name", "tags", "text")
"""Fields of a document that are no tags `FIELD:VALUE`."""


@dataclass(frozen=True)
class Document:
    """A document, or the reason why there is none.

    Attributes
    ----------
    path : str
        File, relative to the source.
    row : int
        Number of its line or row in the file, from 1; 0 for a text file.
    start : int
        Where its line begins in the file, bytes.
    id : str
        The document's own id, or its name, or its place.
    name : str
        Its name, or its id, or its place.
    tags : list of str
    text : str
    reason : str
        Why it cannot be read; empty if it can.
    """

    path: str
    row: int = 0
    start: int = 0
    id: str = ""
    name: str = ""
    tags: list[str] = field(default_factory=list)
    text: str = ""
    reason: str = ""

    @property
    def place(self) -> str:
        """The file, and the line or row in it."""
        return f"{self.path}:{self.row}" if self.row else self.path


@dataclass(frozen=True)
class Source:
    """A folder or a file of documents.

    Attributes
    ----------
    url : str
        Path, or URL that fsspec opens.
    """

    url: str

    def files(self) -> dict[str, int]:
        """Files relative to the source, with their bytes.

        Raises
        ------
        GradmemError
            If there are none, or they cannot be listed.
        """
        system, root = opened(self.url)
        try:
            if system.isfile(root):
                return {PurePosixPath(root).name: system.size(root)}
            found = system.find(root, detail=True)
        except Exception as error:  # each file system has errors of its own
            raise GradmemError(f"cannot list {self.url}: {reason(error)}") from error
        sizes = {name[len(root.rstrip("/")) + 1 :]: about.get("size") or 0 for name, about in found.items()}
        shown = {name: size for name, size in sorted(sizes.items()) if not any(p[0] == "." for p in name.split("/"))}
        if not shown:
            raise GradmemError(f"{self.url} holds no documents: give a folder of text files, JSON lines or Parquet")
        return shown

    def groups(self) -> list[list[str]]:
        """Files in groups that one task reads: many text files, or one file of many documents."""
        files = self.files()
        texts = [name for name, size in files.items() if not name.endswith((*JSON_LINES, *PARQUET))]
        several = [[name] for name in files if name.endswith((*JSON_LINES, *PARQUET))]
        return [*several, *(texts[i : i + FILES_AT_ONCE] for i in range(0, len(texts), FILES_AT_ONCE))]

    def read(self, path: str, rows: list[int] | None = None, starts: list[int] | None = None) -> Iterator[Document]:
        """Documents of one file; one that cannot be read has a reason instead of a text.

        Parameters
        ----------
        path : str
            Relative to the source.
        rows, starts : list of int, optional
            Read only these, in this order.
        """
        system, root = opened(self.url)
        whole = root if system.isfile(root) else f"{root.rstrip('/')}/{path}"
        try:
            if path.endswith(JSON_LINES):
                # Files of object storage read no lines of limited length.
                with system.open(whole, "rb") as file, io.BufferedReader(file) as buffered:
                    yield from _lines(buffered, path, rows, starts)
            elif path.endswith(PARQUET):
                with system.open(whole, "rb") as file:
                    yield from _rows(file, path, rows)
            else:
                with system.open(whole, "rb") as file:
                    yield _checked(Document(path), lambda: {"text": _limited(file.read(LARGEST + 1))})
        except Exception as error:  # a file that is damaged, or has gone
            yield Document(path, id=path, name=path, reason=f"cannot read the file: {reason(error)}")

    def read_plan(self, plan: str) -> Iterator[tuple[int, Document]]:
        """Documents of a batch, with their numbers.

        Parameters
        ----------
        plan : str
            JSON: for each file its documents, in their order, as `row`, `start` and number.
        """
        for path, places in json.loads(plan).items():
            rows, starts, numbers = (list(part) for part in zip(*places, strict=True))
            found = self.read(path, rows, starts) if rows[0] else self.read(path)
            last = Document(path, reason="it has gone since the corpus was listed")
            for number in numbers:
                last = next(
                    found, replace(last, text="", reason=last.reason or "it has gone since the corpus was listed")
                )
                yield number, last


def absolute(place: str) -> str:
    """A path as every process finds it, wherever it runs. A URL is one already."""
    return place if "://" in place or "::" in place else os.path.abspath(os.path.expanduser(place))


def opened(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it.

    Raises
    ------
    GradmemError
        If nothing opens such a URL here.
    """
    import fsspec

    try:
        found: tuple[Any, str] = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise GradmemError(f"cannot open {url}: {reason(error)}") from error
    return found


def _lines(file: IO[bytes], path: str, rows: list[int] | None, starts: list[int] | None) -> Iterator[Document]:
    """Documents of a file of JSON lines. Empty lines are none."""
    if rows is not None and starts is not None:
        for row, start in zip(rows, starts, strict=True):
            file.seek(start)
            line = file.readline(LARGEST + 1)
            yield _checked(Document(path, row, start), lambda line=line: _parsed(line))  # type: ignore[misc]
        return
    row, start = 0, 0
    while line := file.readline(LARGEST + 1):
        row += 1
        if line.strip():
            yield _checked(Document(path, row, start), lambda line=line: _parsed(line))  # type: ignore[misc]
        start += len(line)
        while not line.endswith(b"\n") and (line := file.readline(LARGEST)):  # the rest of a line that is too long
            start += len(line)


def _rows(file: IO[bytes], path: str, rows: list[int] | None) -> Iterator[Document]:
    """Documents of a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.ParquetFile(file)
    if "text" not in table.schema_arrow.names:
        raise GradmemError("it has no column `text`")
    wanted = None if rows is None else set(rows)
    row = 0
    for group in range(table.num_row_groups):
        size = table.metadata.row_group(group).num_rows
        if wanted is not None and wanted.isdisjoint(range(row + 1, row + size + 1)):
            row += size
            continue
        for batch in table.iter_batches(ROWS_AT_ONCE, row_groups=[group]):
            texts = batch.column("text").cast(pa.large_binary())  # Parquet does not check that strings are UTF-8
            others = batch.drop_columns(["text"])
            for number in range(len(batch)):
                row += 1
                if wanted is not None and row not in wanted:
                    continue

                def fields(number: int = number, texts: Any = texts, others: Any = others) -> dict[str, Any]:
                    text = texts[number].as_py()
                    return {**others.slice(number, 1).to_pylist()[0], "text": text and _limited(text)}

                yield _checked(Document(path, row), fields)


def _limited(data: bytes) -> str:
    """Decode a text.

    Raises
    ------
    ValueError
        If it is too large or not UTF-8.
    """
    if len(data) > LARGEST:
        raise ValueError(f"it has more than {LARGEST:,} bytes: cut it into several documents")
    return data.decode()


def _parsed(line: bytes) -> dict[str, Any]:
    """The object in a line of JSON."""
    text = _limited(line)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the line is no JSON: {reason(error)}") from error
    if not isinstance(found, dict):
        raise ValueError("the line is no JSON object with a field `text`")
    return found


def _checked(document: Document, fields: Callable[[], dict[str, Any]]) -> Document:
    """The document with its fields, or with the reason why it has none."""
    named = replace(document, id=document.place, name=document.place)
    try:
        found = fields()
        own, name = (_word(found.get(one)) for one in ("id", "name"))
        named = replace(document, id=own or name or document.place, name=name or own or document.place)
        if not isinstance(found.get("text"), str):
            raise ValueError("it has no field `text` that holds a string")
        text_digest(found["text"])  # refuses lone surrogates
    except UnicodeError as error:
        return replace(named, reason=f"it is not UTF-8 text: {reason(error)}")
    except (ValueError, TypeError) as error:
        return replace(named, reason=reason(error))
    return replace(named, tags=tags_of(found), text=found["text"])


def _word(value: Any) -> str:
    """An id or a name as a string; empty if there is none."""
    return "" if value is None or isinstance(value, dict | list) else visible(str(value))


def tags_of(fields: dict[str, Any]) -> list[str]:
    """Tags of a document: those in its field `tags`, and `FIELD:VALUE` for each other field with a plain value.

    Commas become blanks, and a tag ends after 100 characters, as a store requires.
    """
    given = fields.get("tags")
    words = given.split(",") if isinstance(given, str) else given if isinstance(given, list) else []
    found = [str(word) for word in words if isinstance(word, str | int | float)]
    found += [
        f"{name}:{value}"
        for name, value in fields.items()
        if name not in OWN_FIELDS and isinstance(value, str | int | float)
    ]
    cleaned = (" ".join(visible(tag).replace(",", " ").split())[:LONGEST_TAG].strip() for tag in found)
    return sorted({tag for tag in cleaned if tag and tag.isprintable()})[:100]
