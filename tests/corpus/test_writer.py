"""What one process does with a batch: each document is in the destination, or has failed with a reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import gradmem
from gradmem.corpus import writer as writer_module
from gradmem.corpus.destination import InStore, Shards, destination, from_parquet
from gradmem.corpus.documents import Source
from gradmem.corpus.options import Options
from gradmem.corpus.text_writer import TextWriter
from gradmem.corpus.writer import Writer
from gradmem.errors import GradmemError
from gradmem.model import MemoryModel
from gradmem.store import Store

pytest.importorskip("pyarrow")

TEXTS = {"short": "a7:Qz", "long": "a7:Qz\nb1:c2\nd3:e4\nf5:g6", "other": "zz:aa", "alien": "ü:ü", "empty": ""}


@pytest.fixture(autouse=True)
def _own_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts are counted in files beside those of no other test."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture
def checkpoint(tiny: MemoryModel, tmp_path: Path) -> str:
    return str(tiny.save_pretrained(tmp_path / "checkpoint") or tmp_path / "checkpoint")


@pytest.fixture
def source(tmp_path: Path) -> Source:
    (tmp_path / "docs").mkdir()
    for name, text in TEXTS.items():
        (tmp_path / "docs" / name).write_text(text)
    return Source(str(tmp_path / "docs"))


def plan_of(*names: str) -> str:
    return json.dumps({name: [(0, 0, list(TEXTS).index(name))] for name in names})


def run(made: Writer, *names: str) -> dict:
    (line,) = made({"plan": [plan_of(*names)]})["result"]
    return json.loads(line)


def named(found: dict) -> dict[str, set[str]]:
    """Names of the documents in each state."""
    return {state: {list(TEXTS)[int(n)] for n in found[state]} for state in ("written", "skipped", "failed")}


def test_a_batch_in_shards(checkpoint: str, source: Source, tmp_path: Path) -> None:
    folder = Shards(str(tmp_path / "out")).begin()
    made = Writer(Options(checkpoint), source, folder, "run")
    found = run(made, *TEXTS)
    good = {"short", "long", "other"}
    assert named(found) == {"written": good, "skipped": set(), "failed": {"alien", "empty"}}
    assert all(found["failed"].values())
    (shard,) = (tmp_path / "out").glob("*.parquet")
    rows = {row["name"]: row for row in from_parquet(shard)}
    assert rows.keys() == good
    model = gradmem.load(checkpoint)
    for name, row in rows.items():
        alone, written = model.write(TEXTS[name]), gradmem.Memory.from_bytes(row["memory"])
        assert written.receipts[0].context_sha256 == alone.receipts[0].context_sha256
        for key, tensor in alone.tensors.items():
            assert written.tensors[key].allclose(tensor, atol=1e-4)
    assert folder.done() == {key for key in folder.done() if len(key) == 64}
    assert len(folder.done()) == 3


def test_a_batch_again_is_not_written_again(checkpoint: str, source: Source, tmp_path: Path) -> None:
    """As after a process was killed when the shard was there, and nobody had been told."""
    made = Writer(Options(checkpoint), source, Shards(str(tmp_path / "out")).begin(), "run")
    run(made, "short", "long")
    before = {one: one.stat().st_mtime_ns for one in (tmp_path / "out").glob("*.parquet")}
    again = run(made, "short", "long")
    assert named(again)["written"] == {"short", "long"}
    assert again["model"] == 0
    assert {one: one.stat().st_mtime_ns for one in (tmp_path / "out").glob("*.parquet")} == before


def test_a_batch_in_a_store(checkpoint: str, source: Source, tmp_path: Path) -> None:
    place = destination(str(tmp_path / "memories.db"))
    assert isinstance(place, InStore)
    with Store(tmp_path / "memories.db") as store:
        model = gradmem.load(checkpoint)
        before = store.write(model, TEXTS["short"], name="mine")
        store.put(model.write("qq:qq"), name="other")
    found = run(Writer(Options(checkpoint), source, place.begin(), "run"), *TEXTS)
    assert named(found) == {"written": {"long"}, "skipped": {"short"}, "failed": {"other", "alien", "empty"}}
    assert "taken" in found["failed"][str(list(TEXTS).index("other"))]
    with Store(tmp_path / "memories.db") as store:
        assert store.get("mine").id == before.id
        assert store.write(model, TEXTS["long"]).name == "long"  # the same content hash as that of `Store.write`
        assert len(store.list()) == 3


def test_options_make_other_documents(checkpoint: str) -> None:
    settings = {TextWriter(Options(checkpoint, **one)).settings for one in ({}, {"steps": 3}, {"precision": "int8"})}
    assert len(settings) == 3


def test_a_batch_that_kills_is_given_up(
    checkpoint: str, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a process is killed with, it leaves the count of its attempt behind."""

    class Killed(BaseException):
        pass

    def kill(*arguments: object) -> None:
        raise Killed

    made = Writer(Options(checkpoint), source, Shards(str(tmp_path / "out")).begin(), str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(made.writer, "write", kill)
        for _ in range(writer_module.ATTEMPTS):
            with pytest.raises(Killed):
                run(made, "short", "long")
    assert named(run(made, "short", "long")) == {"written": set(), "skipped": set(), "failed": set()}
    assert named(run(made, "short"))["written"] == {"short"}


def test_a_folder_belongs_to_the_last_run(checkpoint: str, source: Source, tmp_path: Path) -> None:
    made = Writer(Options(checkpoint), source, Shards(str(tmp_path / "out")).begin(), "run")
    later = Shards(str(tmp_path / "out")).begin()
    for _ in range(writer_module.ATTEMPTS + 1):  # a process that lives may try as often as it is asked to
        assert "another run" in run(made, "short")["fatal"]
    assert later.done() == set()


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    folder = Shards(str(tmp_path / "out")).begin()
    (tmp_path / "out" / "x.parquet").write_bytes(b"not Parquet")
    with pytest.raises(GradmemError, match=r"x\.parquet .* damaged"):
        folder.done()


def test_where_memories_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes on other machines have another directory and another environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRADMEM_STORE", "mine")
    found = {place: destination(place) for place in (None, "x.db", "postgresql://me:word@host/db")}
    assert all(isinstance(one, InStore) for one in found.values())
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    monkeypatch.delenv("GRADMEM_STORE")
    assert [one.location.partition("://")[2] for one in found.values() if isinstance(one, InStore)] == [
        f"/{tmp_path}/mine",
        f"/{tmp_path}/x.db",
        "me:word@host/db",
    ]
    for place, whole in (
        ("out", f"{tmp_path}/other/out"),
        ("s3://bucket/out", "s3://bucket/out"),
        ("/out.d", "/out.d"),
    ):
        assert destination(place) == Shards(whole)
