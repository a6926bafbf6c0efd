"""What the processes of a run do: load the model once, then time a sample, or write batch after batch."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..device import clock
from ..errors import GradmemError, Unavailable, reason
from ..receipts import text_digest
from .destination import Destination
from .documents import Source
from .options import Options

SAMPLE_SECONDS = 10.0
"""Seconds after which no more of a sample is written."""
ATTEMPTS = 2
"""How often a batch is tried when its process dies. Then it is cut into smaller ones."""
NOTHING: dict[str, Any] = {"written": {}, "skipped": {}, "failed": {}, "bytes": 0}


class Writer:
    """An actor of Ray Data: takes a batch of documents, and returns what became of them when that is on the disk.

    Parameters
    ----------
    options : Options
    source : Source
    destination : Shards or InStore
    run : str
        A name that no other run has.
    """

    def __init__(self, options: Options, source: Source, destination: Destination, run: str) -> None:
        from .text_writer import TextWriter

        self.writer, self.source, self.destination, self.run = TextWriter(options), source, destination, run

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """Write a batch.

        Parameters
        ----------
        batch : dict
            One row: the `plan` that `Source.read_plan` takes.

        Returns
        -------
        dict
            One row, JSON: the numbers of the documents `written`, `skipped` and `failed`, each with a reason, the
            `bytes` of their memories, and the seconds of the `model`; or what must stop the run, `fatal`.
        """
        (plan,) = batch["plan"]
        self.writer.model_seconds = 0.0
        try:
            with attempt(f"{self.run} {plan}") as allowed:
                found: dict[str, Any] = self._write(str(plan)) if allowed else {**NOTHING}
        except Exception as error:  # not of a document: the disk is full, the database has gone
            found = {**NOTHING, "fatal": reason(error)}
        return {"result": [json.dumps({**found, "model": self.writer.model_seconds})]}

    def _write(self, plan: str) -> dict[str, Any]:
        skipped, failed, todo = {}, {}, []
        for number, document in self.source.read_plan(plan):
            try:
                prepared = self.writer.prepare(number, document)
                if self.destination.stored(prepared.content, prepared.name):
                    skipped[number] = ""
                else:
                    todo.append(prepared)
            except Unavailable:
                raise
            except GradmemError as error:
                failed[number] = str(error)
        present = self.destination.present([one.key for one in todo])  # a process was killed after it had written
        written = {one.number: "" for one in todo if one.key in present}
        todo = [one for one in todo if one.key not in present]
        refused, memories = {}, {}
        for prepared, memory in self.writer.write(todo):
            if isinstance(memory, str):
                refused[prepared.key] = memory
            else:
                memories[prepared.key] = memory
        if memories:
            refused |= self.destination.save([one.key for one in todo], list(memories.values()))
        failed |= {one.number: refused[one.key] for one in todo if one.key in refused}
        written |= {one.number: "" for one in todo if one.key not in refused}
        size = sum(len(memory.data) for key, memory in memories.items() if key not in refused)
        return {"written": written, "skipped": skipped, "failed": failed, "bytes": size}


@contextmanager
def attempt(batch: str) -> Iterator[bool]:
    """Count the attempts at a batch, by a file that a process leaves behind when it dies; yield whether to try.

    Ray gives a batch whose process has died to another process, again and again.
    """
    file = Path(tempfile.gettempdir()) / f".gradmem-{text_digest(batch)}"
    try:
        with file.open("ab") as count:
            count.write(b".")
            allowed = count.tell() <= ATTEMPTS
    except OSError:  # no room even for a byte: the disk is full, which is no fault of the batch
        allowed = True
    try:
        yield allowed
    except Exception:  # the batch has failed, but its process lives
        _forget(file)
        raise
    _forget(file)


def _forget(file: Path) -> None:
    with suppress(OSError):
        file.unlink(missing_ok=True)


class Probe:
    """An actor that says how documents are written, and times a sample of them.

    Parameters
    ----------
    options : Options
    """

    def __init__(self, options: Options) -> None:
        self.options = options

    def settings(self) -> str:
        """SHA-256 of the checkpoint and the options.

        Raises
        ------
        GradmemError
            As for `TextWriter`.
        """
        from .text_writer import TextWriter

        self.writer = TextWriter(self.options)
        return self.writer.settings

    def measure(self, plan: str, source: Source, destination: Destination) -> tuple[float, float, float]:
        """Time a sample: seconds and bytes of a document, means, and the share of documents that are not there yet.

        Parameters
        ----------
        plan : str
            As for `Source.read_plan`.
        source : Source
        destination : Shards or InStore
        """
        documents, sampled, stored = [], 0, 0
        for number, document in source.read_plan(plan):
            sampled += 1
            with suppress(GradmemError):  # it will fail when it is its turn
                prepared = self.writer.prepare(number, document)
                if destination.stored(prepared.content, prepared.name):
                    stored += 1
                else:
                    documents.append(prepared)
        if not documents:
            return 0.0, 0.0, 1 - stored / sampled
        list(self.writer.write(documents[:1]))  # what is made at first use is not counted
        groups = list(self.writer.groups(documents))
        random.Random(0).shuffle(groups)
        began, done, size = clock(), 0, 0
        for group in groups:
            size += sum(len(memory.data) for _, memory in self.writer.write(group) if not isinstance(memory, str))
            done += len(group)
            if clock() - began > SAMPLE_SECONDS:
                break
        good = len(documents) / (sampled - stored)
        return good * (clock() - began) / done, good * size / done, 1 - stored / sampled
