"""A run that writes a corpus: what is there, what is missing, what it will take, and the writing."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..errors import GradmemError, reason
from .cluster import Workers
from .destination import Destination, document_key
from .documents import Source
from .options import Options
from .writer import Probe, Writer

SAMPLE = 32
"""Documents that are timed before the run."""
BATCH_SECONDS, BATCH_BYTES, BATCH_DOCUMENTS = 30.0, 2**26, 1024
"""What a worker writes at once, and may lose when it is killed, at most."""
BATCHES_OF_WORKER = 4
"""Least batches of each worker, so that all have work to the end."""
SMALLER = 16
"""A batch whose process died is cut into so many, and then into single documents."""
DIED = "its process died whenever it was written: out of memory, or killed; the next run tries it again"


@dataclass
class Listed:
    """Where a document is, and what became of it.

    Attributes
    ----------
    path, row, start
        As in `Document`.
    size : int
        Bytes of the text.
    digest : str
        SHA-256 of the text; empty if it cannot be read.
    id : str
    state : str
        Empty, `written`, `skipped` or `failed`.
    reason : str
        Why it failed.
    """

    path: str
    row: int
    start: int
    size: int
    digest: str
    id: str
    state: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Estimate:
    """What a run will take, from a sample.

    Attributes
    ----------
    documents : int
        Those that are missing; an estimate too if they go into a store.
    seconds : float or None
        Of all workers together working on them. None if the process that timed the sample died.
    gigabytes : float or None
        Of their memories; likewise.
    least : bool
        Whether only the smallest document was timed, since the process died of the others.
    """

    documents: int
    seconds: float | None
    gigabytes: float | None
    least: bool = False


def list_group(row: dict[str, Any], source: Source) -> Iterator[dict[str, Any]]:
    """Read the files of a group, and yield what a run must know of each document."""
    from ..receipts import text_digest

    for path in row["paths"]:
        for one in source.read(path):
            digest = "" if one.reason else text_digest(one.text)
            about = {"path": one.path, "row": one.row, "start": one.start, "id": one.id, "reason": one.reason}
            yield {**about, "size": len(one.text.encode()) if digest else 0, "digest": digest}


@dataclass
class Run:
    """Write a corpus on a cluster that has been started.

    Attributes
    ----------
    source : Source
    destination : Shards or InStore
    options : Options
    workers : Workers
    documents : list of Listed
        Set by `read_source`.
    model_seconds, seconds : float
        Of the model in all workers, and of the run.
    bytes : int
        Of the memories written.
    """

    source: Source
    destination: Destination
    options: Options
    workers: Workers
    documents: list[Listed] = field(default_factory=list)
    model_seconds: float = 0.0
    bytes: int = 0
    settings: str = ""
    batch: int = BATCH_DOCUMENTS
    name: str = field(default_factory=lambda: secrets.token_hex(16))

    @property
    def missing(self) -> list[int]:
        """Numbers of the documents that are neither written, nor skipped, nor failed."""
        return [number for number, one in enumerate(self.documents) if not one.state]

    def count(self, state: str) -> int:
        """How many documents are `written`, `skipped` or `failed`."""
        return sum(one.state == state for one in self.documents)

    def read_source(self) -> None:
        """Read all documents once. One that cannot be read has failed, one with the text of another is skipped.

        Raises
        ------
        GradmemError
            If there are none.
        """
        import ray

        groups = [{"paths": group} for group in self.source.groups()]
        listed = ray.data.from_items(groups, override_num_blocks=len(groups)).flat_map(
            list_group, fn_kwargs={"source": self.source}
        )
        rows = sorted(_rows(listed), key=lambda row: (row["path"], row["row"], row["start"]))
        self.documents = []
        seen: set[str] = set()
        for row in rows:
            why = row.pop("reason")
            state = "failed" if why else "skipped" if row["digest"] in seen else ""
            seen.add(row["digest"])
            self.documents.append(Listed(**row, state=state, reason=why))
        if not self.documents:
            raise GradmemError(f"{self.source.url} holds no documents")

    def estimate(self) -> Estimate:
        """Load the model, find out what is missing, and time a sample of it.

        Raises
        ------
        GradmemError
            If the model cannot be loaded.
        """
        with self._probe() as probe:
            self.destination = self.destination.begin()
            self.skip_done("skipped")
            by_size = sorted(self.missing, key=lambda number: self.documents[number].size)
            if not by_size:
                return Estimate(0, 0.0, 0.0)
            measured = self._measure(probe, by_size[:: max(1, len(by_size) // SAMPLE)][:SAMPLE])
        if least := measured is None:
            with self._probe() as probe:
                measured = self._measure(probe, by_size[:1])
        of_workers = -(-len(by_size) // (BATCHES_OF_WORKER * self.workers.count))
        if measured is None:
            self.batch = min(SMALLER, of_workers)
            return Estimate(len(by_size), None, None)
        seconds, size, share = measured
        count = round(share * len(by_size))
        of_time, of_size = BATCH_SECONDS / max(seconds, 1e-9), BATCH_BYTES / max(size, 1.0)
        self.batch = max(1, int(min(of_time, of_size, of_workers, BATCH_DOCUMENTS)))
        return Estimate(count, seconds * count / self.workers.count, size * count / 1e9, least)

    @contextmanager
    def _probe(self) -> Iterator[Any]:
        """Start a probe that has loaded the model, and end it after the block."""
        import ray

        probe = ray.remote(**self.workers.resources)(Probe).remote(self.options)
        try:
            self.settings = ray.get(probe.settings.remote())
            yield probe
        except ray.exceptions.RayError as error:
            raise _cause(error) from error
        finally:
            ray.kill(probe)

    def _measure(self, probe: Any, sample: list[int]) -> tuple[float, float, float] | None:
        """What `Probe.measure` says of these documents; None if its process dies."""
        import ray

        try:
            measured: tuple[float, float, float] = ray.get(
                probe.measure.remote(self._plan(sample), self.source, self.destination)
            )
        except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError):  # not what the probe itself raises
            return None
        return measured

    def skip_done(self, state: str) -> None:
        """Give this state to the missing documents whose memories are in the destination."""
        done = self.destination.done()
        for number in self.missing if done else []:
            if document_key(self.settings, self.documents[number].digest) in done:
                self.documents[number].state = state

    def write(self) -> Iterator[int]:
        """Write what is missing; yield how many documents have been dealt with, again and again.

        Raises
        ------
        GradmemError
            If the destination fails, or the workers cannot be started.
        """
        for size in dict.fromkeys([self.batch, max(1, self.batch // SMALLER), 1]):
            yield from self._round(size)
            self.skip_done("written")  # by processes that died before they could say so
            if not self.missing:
                return
        for number in self.missing:
            self._set(number, "failed", DIED)

    def _round(self, size: int) -> Iterator[int]:
        """Write what is missing in batches of this size; those whose process dies are still missing then."""
        import ray

        missing = self.missing
        plans = [{"plan": self._plan(missing[first : first + size])} for first in range(0, len(missing), size)]
        if not plans:
            return
        count = min(self.workers.count, len(plans))
        results = ray.data.from_items(plans, override_num_blocks=len(plans)).map_batches(
            Writer,
            batch_size=1,
            fn_constructor_args=(self.options, self.source, self.destination, self.name),
            compute=ray.data.ActorPoolStrategy(size=count, max_tasks_in_flight_per_actor=2),
            **self.workers.resources,
        )
        for row in _rows(results):
            found = json.loads(row["result"])
            self.model_seconds += found["model"]
            if "fatal" in found:
                raise GradmemError(found["fatal"])
            self.bytes += found["bytes"]
            for state in ("written", "skipped", "failed"):
                for number, why in found[state].items():
                    self._set(int(number), state, why)
            yield sum(len(found[state]) for state in ("written", "skipped", "failed"))

    def _set(self, number: int, state: str, why: str = "") -> None:
        self.documents[number].state, self.documents[number].reason = state, why

    def _plan(self, numbers: list[int]) -> str:
        """What a worker must know of some documents, as `Source.read_plan` takes it."""
        files: dict[str, list[tuple[int, int, int]]] = {}
        for number in sorted(numbers):
            one = self.documents[number]
            files.setdefault(one.path, []).append((one.row, one.start, number))
        return json.dumps(files)

    def save_failures(self) -> str:
        """Write the side file, one line of JSON for each document that failed, and return where it is."""
        failed = [one for one in self.documents if one.state == "failed"]
        places = (f"{one.path}:{one.row}" if one.row else one.path for one in failed)
        lines = (
            {"id": one.id, "place": place, "reason": one.reason} for one, place in zip(failed, places, strict=True)
        )
        return self.destination.write_failed("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in lines))

    def report(self, seconds: float) -> dict[str, Any]:
        """What became of the documents, and the share of the workers' time that was not the model's.

        Parameters
        ----------
        seconds : float
            Of the whole run.
        """
        return {
            "documents": len(self.documents),
            **{state: self.count(state) for state in ("written", "skipped", "failed")},
            "bytes": self.bytes,
            "workers": self.workers.count,
            "seconds": round(seconds, 3),
            "documents_per_second": round(self.count("written") / seconds, 3),
            "model_seconds": round(self.model_seconds, 3),
            "not_model": round(max(0.0, 1 - self.model_seconds / (self.workers.count * seconds)), 4),
        }


def _rows(data: Any) -> Iterator[dict[str, Any]]:
    """Rows of a data set as they come.

    Raises
    ------
    GradmemError
        If it fails as a whole.
    """
    import ray

    try:
        yield from data.iter_rows()
    except (ray.exceptions.RayError, OSError, RuntimeError) as error:
        raise _cause(error) from error


def _cause(error: BaseException) -> GradmemError:
    """What a failure on a worker was, as one line."""
    from ray.exceptions import RayError

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, GradmemError) and not isinstance(cause, RayError):  # Ray's own are of both kinds
            return GradmemError(str(cause))
        cause = getattr(cause, "cause", None) or cause.__cause__
    return GradmemError(f"a worker failed: {reason(error)}")
