"""The requests that wait for an engine: queries, and texts to write."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from ..errors import GradmemError
from ..memory import Memory
from ..methods.base import Written
from ..model import Answer, BoundMemory, MemoryModel
from ..sampling import Sampling, Token
from ..tasks.base import Conversation

OnText = Callable[[str], object]
OnToken = Callable[[Token], object]
OnStep = Callable[[Written, int], object]


class AnswerFuture(Future[Answer]):
    """The answer to come. `cancel` also ends an answer that is being generated, soon after it returns False."""

    def __init__(self) -> None:
        super().__init__()
        self.abandoned = False

    def cancel(self) -> bool:
        """Give the answer up."""
        self.abandoned = True
        return super().cancel()


@dataclass(eq=False)
class AskRequest:
    """A query that waits for its answer."""

    key: Hashable
    memory: BoundMemory
    query: str | Conversation
    sampling: Sampling
    on_text: OnText | None
    on_token: OnToken | None
    timeout: float
    future: AnswerFuture = field(default_factory=AnswerFuture)
    arrived: float = field(default_factory=time.monotonic)
    ids: list[int] = field(default_factory=list)

    @property
    def most_tokens(self) -> int:
        """Most tokens of the answer."""
        return self.sampling.max_tokens or self.memory.model.task.answer_length

    @property
    def controlled(self) -> bool:
        """Whether the answer is not just the greedy one as a whole."""
        return self.on_text is not None or self.on_token is not None or self.sampling != Sampling()

    def start(self) -> bool:
        """Tokenize the query. Return False if it was cancelled, came too late or is invalid."""
        if not self.future.set_running_or_notify_cancel():
            return False
        try:
            if time.monotonic() > self.arrived + self.timeout:
                raise TimeoutError(f"the query waited longer than its {self.timeout:g} s")
            self.ids = self.memory.model.encoder.query_ids(self.query, {"max_new_tokens": self.most_tokens})
        except Exception as error:  # any error: the engine's thread must survive it
            self.future.set_exception(error)
        return not self.future.done()

    def fits(self, taken: int) -> bool:
        """Whether the query and its answer have room behind a prefix that takes so many positions; if not, fail."""
        most, query = self.memory.model.method.backbone.max_positions, len(self.ids)
        if taken + query + self.most_tokens > most:
            message = (
                f"the query has {query} tokens and its answer may have {self.most_tokens}: the memory leaves room for "
                f"{max(0, most - taken)} tokens in all"
            )
            self.future.set_exception(GradmemError(message))
        return not self.future.done()


@dataclass(eq=False)
class WriteRequest:
    """A text that waits to be written."""

    text: str | Sequence[str]
    model: MemoryModel
    onto: Memory | None
    on_step: OnStep | None
    options: dict[str, Any]
    future: Future[BoundMemory] = field(default_factory=Future)

    def fits_batch(self, other: WriteRequest) -> bool:
        """Whether both can be written in one batch: new memories of one text each, with the same options."""
        new = all(isinstance(one.text, str) and one.onto is None for one in (self, other))
        return new and self.model is other.model and self.options == other.options

    def start(self) -> bool:
        """Check the text, so that an invalid one does not stop its batch. Return False if it cannot be written."""
        if not self.future.set_running_or_notify_cancel():
            return False
        try:
            for text in [self.text] if isinstance(self.text, str) else self.text:
                self.model.encoder.context_ids(text)
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
