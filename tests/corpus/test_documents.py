"""What a source holds: each document with its name and tags, or the reason why it cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile

from gradmem.corpus import documents
from gradmem.corpus.documents import Document, Source
from gradmem.errors import GradmemError

pq = pytest.importorskip("pyarrow.parquet")
pa = pytest.importorskip("pyarrow")


def read(folder: Path) -> dict[str, Document]:
    """All documents, by place."""
    source = Source(str(folder))
    return {one.place: one for group in source.groups() for path in group for one in source.read(path)}


def test_a_folder_of_texts(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.txt").write_bytes("first\r\nline ü".encode())
    (tmp_path / "two.md").write_text("second")
    (tmp_path / ".hidden").write_text("no document")
    found = read(tmp_path)
    assert {place: (one.id, one.name, one.text) for place, one in found.items()} == {
        "a/one.txt": ("a/one.txt", "a/one.txt", "first\r\nline ü"),
        "two.md": ("two.md", "two.md", "second"),
    }


def test_lines_of_json(tmp_path: Path) -> None:
    lines = [
        {"id": 7, "text": "seven", "lang": "en", "year": 1999, "who": {"a": 1}, "title": "a, b\nc"},
        {"name": "eight", "text": "8", "tags": ["x", "y"]},
        {"id": "i", "name": "n", "text": "\0", "tags": "p,q", "long": "z" * 200},
        {"text": "bare"},
    ]
    (tmp_path / "docs.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    seven, eight, both, bare = read(tmp_path).values()
    assert (seven.id, seven.name, seven.text, seven.row) == ("7", "7", "seven", 1)
    assert seven.tags == ["lang:en", "title:a b c", "year:1999"]
    assert (eight.id, eight.name, eight.tags, eight.row) == ("eight", "eight", ["x", "y"], 3)
    assert (both.id, both.name, both.text, both.tags) == ("i", "n", "\0", ["long:" + "z" * 95, "p", "q"])
    assert (bare.id, bare.name) == ("docs.jsonl:7", "docs.jsonl:7")


class Blocks(MemoryFileSystem):
    """Reads files as object storage does: by ranges of bytes."""

    protocol = "blocks"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("blocks://")))

    def _open(self, path: str, mode: str = "rb", **others: Any) -> Any:
        return AbstractBufferedFile(self, path) if mode == "rb" else super()._open(path, mode, **others)


def test_object_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("blocks", Blocks, clobber=True)
    monkeypatch.setattr(documents, "LARGEST", 1000)
    lines = [{"id": "a", "text": "first"}, {"id": "b", "text": "x" * 1000}, {"id": "c", "text": "ü"}]
    Blocks().pipe_file("/docs/d.jsonl", "\n".join(json.dumps(line) for line in lines).encode())
    source = Source("blocks://docs")
    (group,) = source.groups()
    a, b, c = source.read(*group)
    assert (a.id, a.text, c.id, c.text) == ("a", "first", "c", "ü")
    assert "cut it into several" in b.reason
    (again,) = source.read("d.jsonl", [c.row], [c.start])
    assert again == c


def test_rows_of_parquet(tmp_path: Path) -> None:
    texts = pa.array([b"one", None, b"\xff", b"four"], pa.binary())
    pq.write_table(
        pa.table({"text": texts, "id": [1, 2, 3, 4], "lang": ["en", "de", "en", None]}), tmp_path / "d.parquet"
    )
    one, none, bad, four = read(tmp_path).values()
    assert (one.id, one.text, one.tags, one.row) == ("1", "one", ["lang:en"], 1)
    assert (none.text, bad.text) == ("", "")
    assert "no field `text`" in none.reason
    assert "UTF-8" in bad.reason
    assert (four.text, four.tags, four.reason) == ("four", [], "")


def test_what_cannot_be_read_has_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "LARGEST", 1000)
    lines = [
        b"{",
        b"[1]",
        b'{"text": 3}',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b'{"text": "%s"}' % (b"x" * 5000),
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*lines, b'{"text": "good"}']))
    (tmp_path / "b.txt").write_bytes(b"\xfe\xff")
    (tmp_path / "c.txt").write_bytes(b"y" * 5000)
    (tmp_path / "d.parquet").write_bytes(b"PAR1, so it says")
    found = read(tmp_path)
    reasons = {place: one.reason for place, one in found.items()}
    assert reasons.pop("a.jsonl:7") == ""
    assert found["a.jsonl:7"].text == "good"
    expected = ["no JSON", "no JSON object", "no field `text`", "UTF-8", "UTF-8", "more than 1,000 bytes"]
    expected += ["UTF-8", "more than 1,000 bytes", "cannot read the file"]
    assert len(reasons) == len(expected)
    assert [
        part for part, why in zip(expected, [reasons[one] for one in sorted(reasons)], strict=True) if part not in why
    ] == []


def test_a_plan_reads_what_it_names(tmp_path: Path) -> None:
    """The same documents as in the whole file, in any part of it."""
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": f"line {i} ü"}) for i in range(9)))
    rows = pa.table({"text": [f"row {i}" for i in range(9)]})
    pq.write_table(rows, tmp_path / "c.parquet", row_group_size=2)
    found = list(read(tmp_path).values())
    for numbers in ([0, 3, 8], [9, 10, 11, 15], list(range(len(found)))):
        plan: dict[str, list[tuple[int, int, int]]] = {}
        for number in numbers:
            one = found[number]
            plan.setdefault(one.path, []).append((one.row, one.start, number))
        read_again = dict(Source(str(tmp_path)).read_plan(json.dumps(plan)))
        assert read_again == {number: found[number] for number in numbers}


def test_a_document_that_has_gone(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    plan = {"a.jsonl": [(1, 0, 5), (2, 16, 6)], "gone.txt": [(0, 0, 7)]}
    found = dict(Source(str(tmp_path)).read_plan(json.dumps(plan)))
    assert found[5].text == "one"
    assert [found[6].text, found[7].text] == ["", ""]
    assert found[6].reason
    assert found[7].reason


@pytest.mark.parametrize("name", ["", "absent", "empty", "none://x"])
def test_a_source_without_documents(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(GradmemError):
        Source(name if "://" in name else str(tmp_path / "empty" / name)).groups()
