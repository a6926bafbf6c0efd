"""The JSON of `/v1/memories`: bodies of requests and responses, and the events of a streamed write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field

from ...choices import Precision
from ...model import Answer
from ...store import Entry, Version
from ..validation import Line, Query, TagLine, Tags, Text


class WriteOptions(BaseModel):
    """How many write steps to take. By default as many as the checkpoint was trained for."""

    steps: int | None = Field(None, ge=0, le=10_000)
    until: float | None = Field(None, gt=0, allow_inf_nan=False, description="Stop at this write loss instead.")
    max_steps: int | None = Field(None, ge=0, le=10_000, description="Most steps that `until` may take.")
    stream: bool = Field(False, description="Answer with server-sent events: `step` after each step, then `memory`.")
    tokens: bool = Field(
        False,
        description="Also send an event `tokens` first, and `token_losses` in each event `step`. A text that is stored "
        "already is then written again.",
    )

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `MemoryModel.write`."""
        return {"steps": self.steps, "until": self.until, "max_steps": self.max_steps}


class StoreOptions(WriteOptions):
    """How to write a memory, and how to store it."""

    checkpoint: Line
    name: Line | None = None
    precision: Precision = "float32"


class NewMemory(StoreOptions):
    """A text to write."""

    text: Text
    tags: Tags = []


class TextFileOptions(StoreOptions):
    """Options of an uploaded text file, in the query string."""

    tags: TagLine = Field("", description="Tags, separated by commas.")


class MoreText(WriteOptions):
    """More text to write into a memory."""

    text: Text
    before: Text | None = Field(None, description="The text written before: measures how much of it is still kept.")
    may_forget: bool = Field(
        False,
        description="Append even if the checkpoint was not trained to append, and forgets most of the earlier text.",
    )


class Change(BaseModel):
    """What to change. Omitted fields stay as they are."""

    name: Line | None = Field(None, description="New name; null removes the name.")
    tags: Tags = Field([], description="New tags, which replace the present ones.")
    pinned: bool = False


class Queries(BaseModel):
    """Queries to one memory."""

    queries: list[Query] = Field(min_length=1, max_length=64, fail_fast=True)
    version: int | None = Field(None, ge=1, le=2**31 - 1, description="Version; by default the current one.")


class Answers(BaseModel):
    """Answers in the order of the queries."""

    answers: list[Answer]


class Page(BaseModel):
    """One page of memories, the newest first."""

    memories: list[Entry]
    next: str | None = Field(description="Value of `after` for the next page; null on the last page.")


class Inspected(BaseModel):
    """A memory with its versions and the write receipts of its rows."""

    memory: Entry
    memory_bytes: int = Field(description="Bytes of the memory's tensors in float32. Its file also holds receipts.")
    versions: list[Version]
    receipts: list[dict[str, Any]] = Field(description="Write receipt of each row of the current version.")


@dataclass(frozen=True)
class Step:
    """Event `step`: the number of steps taken, the number to take, and the mean loss before the next, in nats."""

    step: int
    of: int
    loss: float | None


@dataclass(frozen=True)
class StepWithTokens(Step):
    """Event `step` with the loss of each token under the memory after these steps."""

    token_losses: list[float]


@dataclass(frozen=True)
class ContextTokens:
    """Event `tokens`: the text in the form that the model reads, cut into its tokens."""

    tokens: list[str]


WriteEvent = ContextTokens | Step | Entry
EVENT_NAMES: dict[type, str] = {ContextTokens: "tokens", Step: "step", StepWithTokens: "step", Entry: "memory"}
