"""The command `gradmem write-corpus`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ..choices import Precision
from ..errors import GradmemError, require
from ..files import save_json
from .console import PROGRESS_SECONDS, console, new_bar, notes

INSTALL = "pip install 'gradmem[ray]'"


def write_corpus(
    source: str,
    checkpoint: str = "smollm2",
    out: str | None = None,
    json: Path | None = None,
    method: str | None = None,
    chunk_size: int | None = None,
    steps: int | None = None,
    precision: Precision = "float32",
    workers: int | None = None,
    gpus_per_worker: float = 0.0,
    address: str | None = None,
    options: dict[str, Any] | None = None,
) -> None:
    """Write many documents into a memory each, with many processes, on one machine or on a cluster of Ray.

    What is there already is not written again: the same command goes on where a run ended, however it ended. Documents
    that cannot be written stop nothing: failed.jsonl names them, with the reason. Needs the extra `ray`.

    Parameters
    ----------
    source
        Folder of text files, JSON lines (*.jsonl) or Parquet files, or one such file, or a URL that fsspec opens. A
        line or row is a document: its field `text`, and if it has them `id`, `name` and `tags`. Other fields become
        tags FIELD:VALUE.
    checkpoint
        Checkpoint or plain language model that writes, as for gradmem write.
    out
        Folder or URL for Parquet shards of memories, or a store: postgresql://USER@HOST/DATABASE, or an SQLite file
        named *.db. Default: the store of the other commands (GRADMEM_STORE).
    json
        File for a report.
    method
        Method for a plain language model, as for gradmem write. Default: compact.
    chunk_size
        Most tokens of a chunk of a document, as for gradmem write.
    steps
        Number of write steps. Default: as many as the checkpoint was trained for.
    precision
        Precision of the memories.
    workers
        Processes that write. Default: one for each core, or for each share of the GPUs.
    gpus_per_worker
        GPUs of each worker, also a part of one; 0 for the CPU.
    address
        Address of a running cluster of Ray, or auto. Default: a private one on this machine.
    options
        Options of the method, such as --budget 0.1 for compact.
    """
    try:
        from ..corpus.cluster import cluster
        from ..corpus.destination import destination
        from ..corpus.documents import Source, absolute
        from ..corpus.options import Options
        from ..corpus.work import Run
    except ImportError as error:
        raise GradmemError(f"writing a corpus needs more packages ({error.name}): {INSTALL}") from error
    require("--steps", steps, steps is None or steps >= 0, "at least 0")
    clock = Phases()
    given = ({"name": method} if method else {}) | (options or {})
    how = Options(checkpoint, given or None, chunk_size, steps, precision, "cuda" if gpus_per_worker else "cpu")
    documents = Source(absolute(source))
    documents.groups()  # refuses a wrong source before anything is started
    with cluster(address, workers, gpus_per_worker) as there:
        run = Run(documents, destination(out), how, there)
        clock.end("start")
        run.read_source()
        clock.end("read")
        estimate = run.estimate()
        clock.end("sample")
        console.print(f"{len(run.documents):,} documents, {_expected(estimate, there.count)}", soft_wrap=True)
        try:
            _write(run)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"wrote {run.count('written'):,} documents; the same command goes on") from None
        side = run.save_failures()
        clock.end("write")
    report = {**run.report(clock.total), "phases": clock.phases}
    if json is not None:
        save_json(report, json)
    console.print(
        "wrote {written:,} of {documents:,} documents in {seconds:,.0f} s ({documents_per_second:.3g} a second); "
        "{skipped:,} were there, {failed:,} failed".format(**report),
        soft_wrap=True,
    )
    if report["failed"]:
        console.print(f"failed documents, with the reasons: {side}", soft_wrap=True)


class Phases:
    """How many seconds each part of a command took."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self._began = self._last = time.monotonic()

    @property
    def total(self) -> float:
        """Seconds up to the end of the last part."""
        return self._last - self._began

    def end(self, name: str) -> None:
        """End a part, and begin the next one."""
        last, self._last = self._last, time.monotonic()
        self.phases[name] = round(self._last - last, 3)


def _expected(estimate: Any, workers: int) -> str:
    """What a run will take, in words."""
    if estimate.seconds is None:
        return f"{estimate.documents:,} to write: no estimate of time, since the process that timed a sample died"
    bound = "at least" if estimate.least else "about"
    return (
        f"{estimate.documents:,} to write: {bound} {estimate.seconds:,.0f} s with {workers} "
        f"{'worker' if workers == 1 else 'workers'}, {estimate.gigabytes:.3g} GB"
    )


def _write(run: Any) -> None:
    """Write what is missing, and show how many documents are written: a bar on a terminal, or a line now and then."""
    total, done, began = len(run.missing), 0, time.monotonic()
    printed = began
    with new_bar(transient=True) as bar:
        task = bar.add_task("writing", total=total, detail="")
        for more in run.write():
            done, now = done + more, time.monotonic()
            detail = f"{done / (now - began):.3g} documents a second"
            bar.update(task, completed=done, detail=detail)
            if not notes.is_terminal and now - printed >= PROGRESS_SECONDS:
                printed = now
                notes.print(f"writing: {done:,} of {total:,}, {detail}", highlight=False, soft_wrap=True)
