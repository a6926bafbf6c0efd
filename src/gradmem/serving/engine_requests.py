"""The requests that wait for an engine: queries, texts to write, and answers that are streamed."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..generation import RowStreamer
from ..memory import Memory
from ..methods.base import Written
from ..model import Answer, BoundMemory, MemoryModel
from ..tasks.base import Conversation

OnText = Callable[[str], object]
OnStep = Callable[[Written, int], object]


@dataclass(eq=False)
class AskRequest:
    """A query that waits for its answer."""

    key: Hashable
    memory: BoundMemory
    query: str | Conversation
    on_text: OnText | None
    timeout: float
    future: Future[Answer] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)
    ids: list[int] = field(default_factory=list)

    def start(self) -> bool:
        """Tokenize the query. Return False if it was cancelled, came too late or is invalid."""
        if not self.future.set_running_or_notify_cancel():
            return False
        try:
            if time.monotonic() > self.arrived + self.timeout:
                raise TimeoutError(f"the query waited longer than its {self.timeout:g} s")
            self.ids = self.memory.model.encoder.query_ids(self.query)
        except Exception as error:  # any error: the engine's thread must survive it
            self.future.set_exception(error)
        return not self.future.done()


@dataclass(eq=False)
class WriteRequest:
    """A text that waits to be written."""

    text: str | Sequence[str]
    onto: Memory | None
    on_step: OnStep | None
    options: dict[str, Any]
    future: Future[BoundMemory] = field(default_factory=Future)

    def fits_batch(self, other: WriteRequest) -> bool:
        """Whether both can be written in one batch: new memories of one text each, with the same options."""
        new = all(isinstance(one.text, str) and one.onto is None for one in (self, other))
        return new and self.options == other.options

    def start(self, model: MemoryModel) -> bool:
        """Check the text, so that an invalid one does not stop its batch. Return False if it cannot be written."""
        if not self.future.set_running_or_notify_cancel():
            return False
        try:
            for text in [self.text] if isinstance(self.text, str) else self.text:
                model.encoder.context_ids(text)
        except Exception as error:  # any error: the engine's thread must survive it
            self.future.set_exception(error)
        return not self.future.done()

    def report_step(self, written: Written, total: int) -> None:
        """Call `on_step`. An error that it raises ends this write only."""
        if self.on_step is None or self.future.done():
            return
        try:
            self.on_step(written, total)
        except Exception as error:
            self.future.set_exception(error)


class AnswerStreamer(RowStreamer):
    """Passes each request the beginning of its answer; transformers calls it after every token of the batch."""

    def __init__(self, requests: list[AskRequest], settled: Callable[[list[int]], str]) -> None:
        self.requests, self.settled = requests, settled
        self.rows: list[int] = []
        self.prompted = False
        self.ids: list[list[int]] = [[] for _ in requests]
        self.texts = [""] * len(requests)

    def begin(self, rows: list[int]) -> None:
        """Take the requests that the next tokens belong to; see `RowStreamer.begin`."""
        self.rows, self.prompted = rows, False

    def put(self, value: Tensor) -> None:
        """Take the prompts in the first call, then one token of each answer."""
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
            except Exception as error:  # an error of one callback must not end the other requests
                request.future.set_exception(error)

    def end(self) -> None:
        """Do nothing: every text has been passed on already."""
