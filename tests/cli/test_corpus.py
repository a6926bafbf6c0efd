"""`gradmem write-corpus` before Ray starts, and shards in `gradmem store import`; runs are in tests/system/."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradmem.cli.main import main
from gradmem.corpus.destination import Shards
from gradmem.corpus.documents import Source
from gradmem.corpus.options import Options
from gradmem.corpus.writer import Writer
from gradmem.model import MemoryModel
from gradmem.store import Store

pytest.importorskip("pyarrow")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["absent"], "absent"),
        (["docs", "--steps", "-1"], "--steps must be at least 0"),
        (["docs", "--workers", "0"], "--workers must be at least 1"),
        (["docs", "--gpus-per-worker", "1.5"], "--gpus-per-worker must be"),
    ],
)
def test_refused(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "one").write_text("a7:Qz")
    assert main(["write-corpus", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_shards_are_imported(
    tiny: MemoryModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "docs.jsonl").write_text('{"name": "notes", "text": "a7:Qz", "lang": "en"}\n')
    source, folder = Source(str(tmp_path / "docs.jsonl")), Shards(str(tmp_path / "out")).begin()
    Writer(Options(str(tmp_path / "checkpoint")), source, folder, "run")({"plan": ['{"docs.jsonl": [[1, 0, 0]]}']})
    (shard,) = (tmp_path / "out").glob("*.parquet")
    for _ in range(2):
        assert main(["store", "import", str(shard), "--tags", "corpus"]) == 0
    with Store() as store:
        (entry,) = store.list()
        assert (entry.name, entry.tags) == ("notes", ("corpus", "lang:en"))
        assert store.load("notes").receipts[0].context_tokens > 0
    assert main(["store", "import", str(shard), "--name", "x"]) == 2
    (tmp_path / "bad.parquet").write_bytes(b"not a shard")
    assert main(["store", "import", "bad.parquet"]) == 2
    assert "no shard" in capsys.readouterr().err
