"""The engine: one thread runs the model and answers in one batch the queries that wait at the same time."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any

from ..errors import GradmemError, require
from ..memory import Memory
from ..methods.base import Written
from ..model import Answer, BoundMemory, MemoryModel
from ..prefix import Prefix
from ..sampling import Sampling
from ..tasks.base import Conversation
from .answer_control import AnswerControl
from .engine_requests import AskRequest, OnStep, OnText, OnToken, WriteRequest
from .errors import Busy, Closed
from .prefix_cache import PrefixCache

MAX_WRITES = 8
"""Most texts that are written in one batch: queries wait for one step of all of them."""


class Engine:
    """Answers queries from many threads in batches whose rows may have different memories.

    One thread of the engine runs the model. Waiting texts are written in batches too. Waiting queries are answered
    between two write steps, so that no query waits longer than one step and one batch.

    Parameters
    ----------
    model : MemoryModel
        Only the engine may use it from now on.
    max_batch : int
        Most queries that are answered in one batch.
    max_wait_ms : float
        Milliseconds that an idle engine waits for more queries before it answers the first one.
    max_queue : int
        Most requests that may wait. The engine refuses further ones with `Busy`.
    prefix_cache_bytes : int
        Most bytes of cached prefixes. The prefix of a memory in the cache need not be computed again.

    Raises
    ------
    GradmemError
        If a number is out of range.

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
        self._prefix_cache = PrefixCache(prefix_cache_bytes)
        self._changed = threading.Condition()
        self._asks: deque[AskRequest] = deque()
        self._writes: deque[WriteRequest] = deque()
        self._closed, self._deadline = False, math.inf
        self._batch_seconds = self._write_seconds = 0.0
        self._since = math.inf
        """When the batch or the write step began that is being computed; infinity if none is."""
        self._thread = threading.Thread(target=self._work, name="gradmem-engine", daemon=True)
        self._thread.start()

    # Methods for any thread

    def ask(
        self,
        key: Hashable,
        memory: BoundMemory,
        query: str | Conversation,
        *,
        timeout: float | None = None,
        sampling: Sampling | None = None,
        on_text: OnText | None = None,
        on_token: OnToken | None = None,
    ) -> Future[Answer]:
        """Queue a query. The answer is that of `BoundMemory.answer`, by default the greedy one.

        Parameters
        ----------
        key : hashable
            Key of the memory in the prefix cache. Each memory, and each version of it, needs its own key.
        memory : BoundMemory
            One row, bound to the engine's model, or by it: another method may read the same backbone. Several rows if
            they are chunks of one document, which its method reads together.
        query : str or list of dict
            A query, or the messages of a conversation; see `Task.encode_conversation`.
        timeout : float, optional
            Most seconds to wait. If they pass before the query is started, the future raises `TimeoutError`.
        sampling : Sampling, optional
            How the tokens of this answer are chosen. Answers with other options share its batch, unless one may be
            twice as long as another: short answers do not wait for long ones.
        on_text : callable
            Called on the engine's thread with the part of the answer that later tokens cannot change, each time it
            grows (see `Task.settled`). It must be quick. An error that it raises ends the request.
        on_token : callable
            Called likewise with each `Token` of the answer, before `on_text` gets the text with it. Only if
            `sampling.top_logprobs` is given.

        Returns
        -------
        Future
            It can be cancelled while the query waits, and given up while its answer is generated. It raises what is
            wrong with the query.

        Raises
        ------
        Busy
            If too many requests are waiting.
        Closed
            If the engine is closed.
        GradmemError
            If the memory has several rows that are not read together, or belongs to another model.
        """
        known = isinstance(memory, BoundMemory) and memory.model.method.backbone is self.model.method.backbone
        if not known or (len(memory) != 1 and not memory.model.method.reads_together):
            raise GradmemError("the engine takes one memory, opened with its own model: model.open(FILE), memory[ROW]")
        seconds = float("inf") if timeout is None else timeout
        request = AskRequest(key, memory, query, sampling or Sampling(), on_text, on_token, seconds)
        self._accept(self._asks, request)
        return request.future

    def write(
        self,
        text: str | Sequence[str],
        *,
        model: MemoryModel | None = None,
        onto: Memory | None = None,
        on_step: OnStep | None = None,
        **options: Any,
    ) -> Future[BoundMemory]:
        """Queue a text, or the chunks of one, to be written into a memory.

        Parameters
        ----------
        text : str or sequence of str
        model : MemoryModel, optional
            Model of a memory that was bound by the engine's model, to write with its method and options. By default the
            engine's model.
        onto : Memory, optional
            Memory of the model to append to. It is not changed: the result is a new memory.
        on_step : callable
            `on_step(written, total)` is called on the engine's thread before the first step and after every step, at
            most `total` times. An error that it raises ends the write.
        options
            `steps`, `until` and `max_steps` of `MemoryModel.write`; `before` of `MemoryModel.append`.

        Returns
        -------
        Future
            It can be cancelled while the write waits.

        Raises
        ------
        Busy, Closed
            As in `ask`.
        GradmemError
            If the model has another backbone than the engine's.
        """
        model = model or self.model
        if model.method.backbone is not self.model.method.backbone:
            raise GradmemError("the engine writes with its own model, or one on the same backbone: model.bind(M).model")
        request = WriteRequest(text, model, onto, on_step, options)
        self._accept(self._writes, request)
        return request.future

    def stuck(self, seconds: float) -> bool:
        """Whether one batch or write step has taken longer than so many seconds, or the thread has died."""
        late = time.monotonic() - self._since > seconds
        return not self._closed and (late or not self._thread.is_alive())

    def close(self, grace: float | None = None) -> None:
        """Accept no more requests, finish those that were accepted, and return.

        Parameters
        ----------
        grace : float, optional
            Seconds after which unfinished requests fail with `Closed`. A write fails after its current step.
        """
        with self._changed:
            self._closed = True
            if grace is not None:
                self._deadline = min(self._deadline, time.monotonic() + grace)
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _accept(self, queue: deque[Any], request: AskRequest | WriteRequest) -> None:
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
        """Remove cancelled requests from the queues."""
        for queue in (self._asks, self._writes):
            kept = [request for request in queue if not request.future.cancelled()]
            queue.clear()
            queue.extend(kept)  # type: ignore[arg-type]

    # Methods for the engine's own thread

    def _work(self) -> None:
        while True:
            with self._changed:
                self._since = math.inf
                self._changed.wait_for(lambda: self._asks or self._writes or self._closed)
                self._since = time.monotonic()
                if not self._asks and not self._writes:
                    return
            if self._past_deadline():
                self._fail_waiting()
                continue
            self._answer_waiting(self.max_wait)
            self._write(self._next_writes())

    def _past_deadline(self) -> bool:
        """Whether the grace period of `close` is over."""
        return time.monotonic() > self._deadline

    def _fail_waiting(self) -> None:
        """Fail all waiting requests with `Closed`."""
        with self._changed:
            waiting: list[AskRequest | WriteRequest] = [*self._asks, *self._writes]
            self._asks.clear()
            self._writes.clear()
        for request in waiting:
            if request.future.set_running_or_notify_cancel():
                request.future.set_exception(Closed("the engine is closed"))

    def _answer_waiting(self, wait: float) -> None:
        """Answer one batch: the queries that wait now, or arrive within `wait` seconds of the first."""
        with self._changed:
            if self._asks:
                rest = self._asks[0].arrived + wait - time.monotonic()
                self._changed.wait_for(lambda: len(self._asks) >= self.max_batch or self._closed, max(0, rest))
            waiting = [self._asks.popleft() for _ in range(min(self.max_batch, len(self._asks)))]
        started = time.monotonic()
        batches: dict[tuple[int, int], list[AskRequest]] = {}
        for request in waiting:
            if request.start():
                # A batch lasts as long as its longest answer: answers of other lengths go their own ways.
                batches.setdefault((request.most_tokens.bit_length(), id(request.memory.model)), []).append(request)
        if not batches:
            return
        for _, requests in sorted(batches.items(), key=lambda batch: batch[0]):  # the shortest first
            try:
                self._read(requests)
            except Exception as error:  # any error: it belongs to the futures, and this thread must survive it
                _fail(requests, error)
        self._batch_seconds = time.monotonic() - started

    def _read(self, requests: list[AskRequest]) -> None:
        """Answer queries to memories of one model from their joined prefixes, each of which is joined once."""
        model = requests[0].memory.model
        rows: dict[Hashable, int] = {}
        memories: list[BoundMemory] = []
        prefixes: list[Prefix] = []
        fitting: list[tuple[AskRequest, int]] = []
        for request in requests:
            key = request.key, request.memory.chosen(request.ids)
            memory = memories[rows[key]] if key in rows else request.memory.together(key[1])
            prefix = self._prefix_cache.get(key, memory)
            if not request.fits(prefix.end):
                continue
            if key not in rows:
                rows[key] = len(memories)
                memories.append(memory)
                prefixes.append(prefix)
            fitting.append((request, rows[key]))
        if not fitting:
            return
        asked = [request for request, _ in fitting]
        options: dict[str, Any] = {}
        if any(request.controlled for request in asked):
            options["control"] = AnswerControl(asked, model.task, self._past_deadline)
            options["max_new_tokens"] = max(request.most_tokens for request in asked)
        queries, order = [request.ids for request in asked], [row for _, row in fitting]
        joined = prefixes[0].join(prefixes[1:])
        for request, answer in zip(
            asked, model.answer_ids(Memory.join(memories), joined, order, queries, **options), strict=True
        ):
            if not request.future.done():
                request.future.set_result(answer)

    def _next_writes(self) -> list[WriteRequest]:
        """Take the write that has waited longest, and those right behind it that fit its batch."""
        with self._changed:
            waiting = [self._writes.popleft()] if self._writes else []
            while self._writes and len(waiting) < MAX_WRITES and waiting[0].fits_batch(self._writes[0]):
                waiting.append(self._writes.popleft())
        return [request for request in waiting if request.start()]

    def _write(self, requests: list[WriteRequest]) -> None:
        """Write texts in one batch, and answer waiting queries between the steps."""
        if not requests:
            return
        first, alone = requests[0], len(requests) == 1
        started, done = time.monotonic(), 0

        def report(steps: Iterable[Written], title: str, total: int) -> Iterator[Written]:
            nonlocal done
            for written in steps:
                rows = [written] if alone else written.rows()
                for request, row in zip(requests if alone else requests[done:], rows, strict=False):
                    request.report_step(row, total)
                if all(request.future.done() for request in requests):
                    raise CancelledError
                if self._past_deadline():
                    raise Closed("the engine is closed")
                self._answer_waiting(0)
                self._since = time.monotonic()
                yield written
            done += len(written.taken)  # the model writes long texts in several batches, one after the other

        options = {"progress": report, **first.options}
        try:
            if first.onto is not None:
                memory = first.model.append(first.onto, first.text, **options)
            else:
                memory = first.model.write(first.text if alone else [str(one.text) for one in requests], **options)
        except Exception as error:  # as in `_answer_waiting`
            _fail(requests, error)
            return
        self._write_seconds = time.monotonic() - started
        for row, request in enumerate(requests):
            if not request.future.done():
                request.future.set_result(memory if alone else memory[row])


def _fail(requests: Sequence[AskRequest | WriteRequest], error: Exception) -> None:
    """Give the error to all requests that have no result yet."""
    for request in requests:
        if not request.future.done():
            request.future.set_exception(error)
