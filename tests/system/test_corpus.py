"""`gradmem write-corpus` as a process, with others that are killed and disks that are full.

After each of these every document is in the destination once, or in the side file with a reason.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from gradmem.corpus.work import DIED
from gradmem.store import Store

pytest.importorskip("ray")
pq = pytest.importorskip("pyarrow.parquet")

DOCUMENTS = 24
PATIENCE = 900.0
"""Seconds until a run that goes nowhere fails the test; on a machine that does nothing else it takes twenty."""
POISON: dict[str, bytes] = {
    "huge": b'{"id": "huge", "text": "' + b"x" * 10_000_000 + b'"}',
    "nul": b'{"id": "nul", "text": "a\\u0000:b\\u0000"}',
    "empty": b'{"id": "empty", "text": ""}',
    "long": json.dumps(
        {"id": "long", "text": "\n".join(f"{a}{b}:{b}{a}" for a in string.ascii_letters for b in string.digits)}
    ).encode(),
    "docs.jsonl:5": b'{"id": "latin", "text": "\xe9"}',
    "docs.jsonl:6": b"no JSON",
}


def texts() -> dict[str, str]:
    """Pairs, as kv-16 reads them, by name; the keys of a text differ."""
    draw, keys = random.Random(0), [a + b for a in string.ascii_lowercase for b in string.digits]
    return {
        f"doc{number}": "\n".join(f"{key}:{draw.choice(keys)}" for key in draw.sample(keys, draw.randint(4, 12)))
        for number in range(DOCUMENTS)
    }


@pytest.fixture
def source(tmp_path: Path) -> str:
    """Poison and good documents, one of them there twice."""
    good = [json.dumps({"id": name, "text": text}).encode() for name, text in texts().items()]
    twice = json.dumps({"id": "twice", "text": texts()["doc0"]}).encode()
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "docs.jsonl").write_bytes(b"\n".join([*POISON.values(), *good, twice]))
    return str(tmp_path / "source")


class Run:
    """The command as a process, in a directory of its own."""

    def __init__(self, folder: Path, source: str, out: str, checkpoint: str = "kv-16", **environment: str) -> None:
        self.folder, self.report = folder, folder / "report.json"
        self.report.unlink(missing_ok=True)
        words = [source, "--checkpoint", checkpoint, "--out", out, "--json", str(self.report), "--workers", "1"]
        self.log = folder / "log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gradmem", "write-corpus", *words],
                cwd=folder,
                env=os.environ | environment,
                stdout=log,
                stderr=log,
            )

    def until(self, reached: Callable[[], bool]) -> None:
        """Wait; the run must not end before."""
        patience = time.monotonic() + PATIENCE
        while not reached():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < patience, self.log.read_text()
            time.sleep(0.05)

    def writer(self) -> psutil.Process:
        """The process of the actor that writes."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        (one,) = (child for child in found if "MapWorker" in " ".join(child.cmdline()))
        return one

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def end(self) -> dict[str, int]:
        """The report."""
        assert self.process.wait(PATIENCE) == 0, self.log.read_text()
        assert "Traceback" not in self.log.read_text()
        found: dict[str, int] = json.loads(self.report.read_text())
        return found


def in_shards(out: Path) -> list[str]:
    """Names of all memories in a folder of shards."""
    found = (pq.read_table(shard, columns=["name"])["name"].to_pylist() for shard in out.glob("*.parquet"))
    return sorted(name for names in found for name in names)


def check(found: list[str], report: dict[str, int], side: Path) -> None:
    """Each document is there once, or in the side file."""
    assert sorted(found) == sorted(texts())
    failed = {line["id"]: line["reason"] for line in map(json.loads, side.read_text().splitlines())}
    assert failed.keys() == POISON.keys()
    assert all(failed.values())
    assert report["documents"] == DOCUMENTS + len(POISON) + 1
    assert report["failed"] == len(POISON)
    assert report["written"] + report["skipped"] == DOCUMENTS + 1


def test_a_writer_is_killed(source: str, tmp_path: Path) -> None:
    """Its batch goes to another process, and the store has each memory once."""
    place = tmp_path / "memories.db"

    def stored() -> list[str]:
        with Store(place) as store:
            return [entry.label for entry in store.list(limit=1000)]

    run = Run(tmp_path, source, str(place))
    run.until(lambda: place.exists() and len(stored()) > 2)
    run.writer().kill()
    report = run.end()
    check(stored(), report, tmp_path / "failed.jsonl")
    with Store(place) as store:
        name, text = list(texts().items())[-1]
        key, value = text.splitlines()[0].split(":")
        assert store.open(name).ask(key) == value


def test_the_driver_is_killed(source: str, tmp_path: Path) -> None:
    """The same command goes on at once, while processes of the first may still be alive, and a third finds nothing."""
    out = tmp_path / "out"
    first = Run(tmp_path, source, str(out))
    first.until(lambda: bool(in_shards(out)))
    first.kill()
    before = len(in_shards(out))
    report = Run(tmp_path, source, str(out)).end()
    check(in_shards(out), report, out / "failed.jsonl")
    assert report["skipped"] > before
    assert report["written"] <= DOCUMENTS - before


DEADLY = """
import os
import signal

from gradmem.corpus.documents import Source

read = Source.read_plan


def read_plan(self, plan):
    for number, document in read(self, plan):
        if document.id == "deadly":
            os.kill(os.getpid(), signal.SIGKILL)
        yield number, document


Source.read_plan = read_plan
"""
"""Kills the process that writes one document, as the kernel does when the memory does not suffice."""


def test_a_document_that_kills_its_process_is_found(tmp_path: Path) -> None:
    """It is in the timed sample and in a batch, and it is the smallest one: the others are written without it."""
    (tmp_path / "sitecustomize.py").write_text(DEADLY)
    good = dict(list(texts().items())[:4])
    lines = ({"id": name, "text": text} for name, text in {**good, "deadly": "a7:Qz"}.items())
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    paths = os.pathsep.join([str(tmp_path), *sys.path[1:]])
    run = Run(tmp_path, str(tmp_path / "docs.jsonl"), str(tmp_path / "out"), PYTHONPATH=paths)
    report = run.end()
    assert "no estimate of time" in run.log.read_text()
    assert in_shards(tmp_path / "out") == sorted(good)
    assert (report["written"], report["failed"]) == (4, 1)
    (failed,) = map(json.loads, (tmp_path / "out" / "failed.jsonl").read_text().splitlines())
    assert (failed["id"], failed["reason"]) == ("deadly", DIED)


def test_a_wrong_checkpoint_ends_with_one_line(source: str, tmp_path: Path) -> None:
    """It is a worker that finds out."""
    run = Run(tmp_path, source, str(tmp_path / "out"), checkpoint="none")
    assert run.process.wait(PATIENCE) == 2
    assert run.log.read_text().startswith("gradmem: error: ")
    assert "'none'" in run.log.read_text()
    assert "ray::" not in run.log.read_text()
    assert run.log.read_text().count("\n") == 1


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A disk of 16 MB; its path is short, as those of sockets must be."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or not shutil.which("mount") or subprocess.run(command, stderr=subprocess.DEVNULL).returncode:
        folder.rmdir()
        pytest.skip("a small disk cannot be mounted here: needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        folder.rmdir()


def test_the_disk_of_a_worker_is_full(source: str, tmp_path: Path, small_disk: Path) -> None:
    """Where Ray spills and logs there is not a byte left: the run ends well or with one line, and goes on elsewhere."""
    out = tmp_path / "out"
    run = Run(tmp_path, source, str(out), RAY_TMPDIR=str(small_disk), TMPDIR=str(small_disk))
    run.until(lambda: bool(in_shards(out)))
    with open(small_disk / "full", "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"0" * 2**20)
    if run.process.wait(PATIENCE):
        assert run.log.read_text().count("gradmem: error:") == 1
        assert "Traceback" not in run.log.read_text()
        run = Run(tmp_path, source, str(out))
    check(in_shards(out), run.end(), out / "failed.jsonl")
