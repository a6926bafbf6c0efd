"""The engine: one thread owns the model and answers together what many ask at the same time."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..errors import GradmemError, require
from ..memory import Memory
from ..methods.base import Written
from ..model import MemoryModel
from ..model.abstain import Answer
from ..prefix import RowStreamer
from .prefix_cache import Prefixes

OnText = Callable[[str], object]
OnStep = Callable[[Written, int], object]
MAX_WRITES = 8
"""Texts to write at once: queries wait for a step of all of them."""


class Busy(GradmemError):
    """Too many requests wait.

    Attributes
    ----------
    retry_after : float
        Seconds in which those that wait are likely to be answered.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Closed(GradmemError):
    """The engine takes no more requests."""


@dataclass(eq=False)
class _Ask:
    """A query that waits for its answer."""

    key: Hashable
    memory: Memory
    query: str
    on_text: OnText | None
    timeout: float
    future: Future[Answer] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)
    ids: list[int] = field(default_factory=list)

    def begin(self, tokenize: Callable[[str], list[int]]) -> bool:
        """Whether it is still to be answered, and can be."""
        if not self.future.set_running_or_notify_cancel():
            return False
        try:
            if time.monotonic() > self.arrived + self.timeout:
                raise TimeoutError(f"the query waited longer than its {self.timeout:g} s")
            self.ids = tokenize(self.query)
        except Exception as error:  # whatever it is, the engine's thread must live
            self.future.set_exception(error)
        return not self.future.done()


@dataclass(eq=False)
class _Write:
    """A text that waits to be written."""

    text: str | Sequence[str]
    onto: Memory | None
    on_step: OnStep | None
    options: dict[str, Any]
    future: Future[Memory] = field(default_factory=Future)

    def joins(self, other: _Write) -> bool:
        """Whether both can be written in one batch: new memories of one text each, with the same steps."""
        new = all(isinstance(one.text, str) and one.onto is None for one in (self, other))
        return new and self.options == other.options

    def begin(self, model: MemoryModel) -> bool:
        """Whether it is still to be written, and can be: a text that cannot must not stop those of its batch."""
        if not self.future.set_running_or_notify_cancel():
            return False
        try:
            for text in [self.text] if isinstance(self.text, str) else self.text:
                model.context_ids(text)
        except Exception as error:  # whatever it is, the engine's thread must live
            self.future.set_exception(error)
        return not self.future.done()

    def tell(self, written: Written, total: int) -> None:
        """Tell of a step, if anybody follows; what the follower raises ends this write and no other."""
        if self.on_step is None or self.future.done():
            return
        try:
            self.on_step(written, total)
        except Exception as error:
            self.future.set_exception(error)


class Engine:
    """Answers queries from many threads, those that wait together in one batch, each from a memory of its own.

    All that touches the model happens on one thread of the engine. Texts that wait are written together too; queries
    are answered between the steps, so that none waits longer than a step and a batch.

    Parameters
    ----------
    model : MemoryModel
        From now on the engine's own.
    max_batch : int
        Queries to answer at once.
    max_wait_ms : float
        How long a query waits for others, in milliseconds, where the engine is idle. While it is busy, others gather
        without that.
    max_queue : int
        Requests that may wait before others are refused.
    prefix_cache_bytes : int
        Bytes of prefixes of memories to keep, so that they are not run again.

    Raises
    ------
    GradmemError
        When a number is out of range.

    Examples
    --------
    >>> with Engine(gradmem.load("kv-32")) as engine:
    ...     memory = engine.write("a7:Qz\\nk2:9f").result()
    ...     engine.ask("notes", memory, "a7").result().text
    'Qz'
    """

    def __init__(
        self,
        model: MemoryModel,
        *,
        max_batch: int = 64,
        max_wait_ms: float = 2.0,
        max_queue: int = 1024,
        prefix_cache_bytes: int = 2**28,
    ) -> None:
        require("max_batch", max_batch, max_batch >= 1, "at least 1")
        require("max_wait_ms", max_wait_ms, max_wait_ms >= 0, "at least 0")
        require("max_queue", max_queue, max_queue >= 1, "at least 1")
        require("prefix_cache_bytes", prefix_cache_bytes, prefix_cache_bytes >= 0, "at least 0")
        self.model = model
        self.max_batch, self.max_wait, self.max_queue = max_batch, max_wait_ms / 1000, max_queue
        self._prefixes = Prefixes(model.method, prefix_cache_bytes)
        self._changed = threading.Condition()
        self._asks: deque[_Ask] = deque()
        self._writes: deque[_Write] = deque()
        self._closed, self._ends = False, math.inf
        self._batch_seconds = self._write_seconds = 0.0
        self._thread = threading.Thread(target=self._work, name="gradmem-engine", daemon=True)
        self._thread.start()

    # For any thread

    def ask(
        self,
        key: Hashable,
        memory: Memory,
        query: str,
        *,
        timeout: float | None = None,
        on_text: OnText | None = None,
    ) -> Future[Answer]:
        """Take a query; the greedy answer is that of `MemoryModel.answer`.

        Parameters
        ----------
        key : hashable
            What this memory's prefix is kept under: another memory needs another key, also after a second WRITE.
        memory : Memory
            One row, bound to the engine's model.
        query : str
        timeout : float, optional
            Seconds after which it is not worth answering any more; the future then raises `TimeoutError`.
        on_text : callable
            Called on the engine's thread with the beginning of the answer that no further token changes, whenever it
            has grown (`Task.settled`). It must be quick; what it raises ends the request.

        Returns
        -------
        Future
            It can be cancelled as long as the query waits.

        Raises
        ------
        Busy
            At once, when too many requests wait.
        Closed
            When the engine is closed.
        GradmemError
            When the memory has several rows or another model; what is wrong with the query, the future says.
        """
        if memory.model is not self.model or len(memory) != 1:
            raise GradmemError("the engine asks single memories of its own model: model.open(FILE), memory[ROW]")
        request = _Ask(key, memory, query, on_text, float("inf") if timeout is None else timeout)
        self._accept(self._asks, request)
        return request.future

    def write(
        self,
        text: str | Sequence[str],
        *,
        onto: Memory | None = None,
        on_step: OnStep | None = None,
        **options: Any,
    ) -> Future[Memory]:
        """Take one text, or several, to write.

        Parameters
        ----------
        text : str or sequence of str
        onto : Memory, optional
            Append to this memory, bound to the engine's model, which stays as it is.
        on_step : callable
            `on_step(written, total)` is called on the engine's thread before the first step and after every step, of
            at most `total` calls. What it raises ends the write.
        options
            `steps`, `until` and `max_steps` of `MemoryModel.write`; `before` of `MemoryModel.append`.

        Returns
        -------
        Future
            It can be cancelled as long as the write waits.

        Raises
        ------
        Busy, Closed
            As `ask`.
        """
        request = _Write(text, onto, on_step, options)
        self._accept(self._writes, request)
        return request.future

    def close(self, grace: float | None = None) -> None:
        """Finish what was accepted and take nothing more; returns when all is done.

        Parameters
        ----------
        grace : float, optional
            Seconds after which what is not finished ends with `Closed`, a write after its current step.
        """
        with self._changed:
            self._closed = True
            if grace is not None:
                self._ends = min(self._ends, time.monotonic() + grace)
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _accept(self, queue: deque[Any], request: _Ask | _Write) -> None:
        with self._changed:
            if self._closed:
                raise Closed("the engine is closed")
            if len(self._asks) + len(self._writes) >= self.max_queue:
                self._drop_cancelled()
            waiting = len(self._asks) + len(self._writes)
            if waiting >= self.max_queue:
                seconds = self._batch_seconds * (1 + len(self._asks) / self.max_batch)
                seconds += self._write_seconds * math.ceil(len(self._writes) / MAX_WRITES)
                raise Busy(f"{waiting} requests are waiting already: try again in {seconds:.1f} s", seconds)
            queue.append(request)
            self._changed.notify()

    def _drop_cancelled(self) -> None:
        """Give the places of requests that were cancelled to others."""
        for queue in (self._asks, self._writes):
            kept = [request for request in queue if not request.future.cancelled()]
            queue.clear()
            queue.extend(kept)  # type: ignore[arg-type]

    # For the engine's own thread

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._asks or self._writes or self._closed)
                if not self._asks and not self._writes:
                    return
            if self._over():
                self._give_up()
                continue
            self._answer_waiting(self.max_wait)
            self._write(self._next_writes())

    def _over(self) -> bool:
        """Whether the time is over that `close` leaves for what was accepted."""
        return time.monotonic() > self._ends

    def _give_up(self) -> None:
        """End all that waits."""
        with self._changed:
            waiting: list[_Ask | _Write] = [*self._asks, *self._writes]
            self._asks.clear()
            self._writes.clear()
        for request in waiting:
            if request.future.set_running_or_notify_cancel():
                request.future.set_exception(Closed("the engine is closed"))

    def _answer_waiting(self, wait: float) -> None:
        """Answer one batch of the queries that are there, or come within `wait` seconds of the first."""
        with self._changed:
            if self._asks:
                rest = self._asks[0].arrived + wait - time.monotonic()
                self._changed.wait_for(lambda: len(self._asks) >= self.max_batch or self._closed, max(0, rest))
            waiting = [self._asks.popleft() for _ in range(min(self.max_batch, len(self._asks)))]
        started = time.monotonic()
        requests = [request for request in waiting if request.begin(self.model.query_ids)]
        if not requests:
            return
        try:
            for request, answer in zip(requests, self._read(requests), strict=True):
                if not request.future.done():
                    request.future.set_result(answer)
        except Exception as error:  # whatever it is, those who wait must know, and the thread must live
            for request in requests:
                if not request.future.done():
                    request.future.set_exception(error)
        self._batch_seconds = time.monotonic() - started

    def _read(self, requests: list[_Ask]) -> list[Answer]:
        """Answers from the joined prefixes of the memories, each of which stands there once."""
        memories = {request.key: request.memory for request in requests}
        row = {key: i for i, key in enumerate(memories)}
        first, *others = [self._prefixes.get(key, memory) for key, memory in memories.items()]
        joined = Memory.join(list(memories.values()))
        joined.prefix = first.join(others)
        options = {}
        if any(request.on_text for request in requests):
            options["streamer"] = _Streamer(requests, self.model.task.settled)
        rows, queries = [row[request.key] for request in requests], [request.ids for request in requests]
        return self.model.answer_ids(joined, rows, queries, **options)

    def _next_writes(self) -> list[_Write]:
        """The write that waits longest, and those right behind it that can share its batch; none, where none waits."""
        with self._changed:
            waiting = [self._writes.popleft()] if self._writes else []
            while self._writes and len(waiting) < MAX_WRITES and waiting[0].joins(self._writes[0]):
                waiting.append(self._writes.popleft())
        return [request for request in waiting if request.begin(self.model)]

    def _write(self, requests: list[_Write]) -> None:
        """Write texts together; between the steps, answer what waits."""
        if not requests:
            return
        first, alone = requests[0], len(requests) == 1
        started, done = time.monotonic(), 0

        def slices(steps: Iterable[Written], title: str, total: int) -> Iterator[Written]:
            nonlocal done
            for written in steps:
                rows = [written] if alone else written.rows()
                for request, row in zip(requests if alone else requests[done:], rows, strict=False):
                    request.tell(row, total)
                if all(request.future.done() for request in requests):
                    raise CancelledError
                if self._over():
                    raise Closed("the engine is closed")
                self._answer_waiting(0)
                yield written
            done += len(written.taken)  # the model takes long texts in several parts, one after the other

        options = {"progress": slices, **first.options}
        try:
            if first.onto is not None:
                memory = self.model.append(first.onto, first.text, **options)
            else:
                memory = self.model.write(first.text if alone else [str(one.text) for one in requests], **options)
        except Exception as error:  # as in `_answer_waiting`
            for request in requests:
                if not request.future.done():
                    request.future.set_exception(error)
            return
        self._write_seconds = time.monotonic() - started
        for row, request in enumerate(requests):
            if not request.future.done():
                request.future.set_result(memory if alone else memory[row])


class _Streamer(RowStreamer):
    """Tells each request its answer so far; transformers calls it after every token of the batch."""

    def __init__(self, requests: list[_Ask], settled: Callable[[list[int]], str]) -> None:
        self.requests, self.settled = requests, settled
        self.rows: list[int] = []
        self.prompted = False
        self.ids: list[list[int]] = [[] for _ in requests]
        self.texts = [""] * len(requests)

    def begin(self, rows: list[int]) -> None:
        """What comes next is of these requests; see `RowStreamer.begin`."""
        self.rows, self.prompted = rows, False

    def put(self, value: Tensor) -> None:
        """Take the prompts, and after them one token of each answer."""
        if not self.prompted:
            self.prompted = True
            return
        for i, token in zip(self.rows, value.tolist(), strict=True):
            request = self.requests[i]
            self.ids[i].append(token)
            if request.on_text is None or request.future.done():
                continue
            try:
                if (text := self.settled(self.ids[i])) != self.texts[i]:
                    self.texts[i] = text
                    request.on_text(text)
            except Exception as error:  # one listener's mistake is not the others'
                request.future.set_exception(error)

    def end(self) -> None:
        """Nothing is left to tell."""
