"""What the memory tools return, as structured content."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field

from ..receipts import Receipt
from ..store import Entry, Version

if TYPE_CHECKING:
    from ..memory import Memory
    from ..model import Answer


class Stored(BaseModel):
    """A memory in the store."""

    id: str
    name: str | None
    tags: list[str]
    model: str = Field(description="Name of the model that wrote it, and that answers from it.")
    created: str
    version: int = Field(description="Number of the current version.")
    chunks: int = Field(description="Number of chunks that the text was cut into.")
    tokens: int = Field(description="Number of tokens of the text.")
    bytes: int = Field(description="Bytes of the memory file.")

    @classmethod
    def of(cls, entry: Entry) -> Stored:
        """Return what a client sees of an entry."""
        current = entry.current
        return cls(
            id=entry.id,
            name=entry.name,
            tags=list(entry.tags),
            model=entry.model,
            created=f"{entry.created:%Y-%m-%dT%H:%M:%SZ}",
            version=current.number,
            chunks=current.rows,
            tokens=current.tokens,
            bytes=current.size,
        )


class Listed(BaseModel):
    """One page of memories, the newest first."""

    memories: list[Stored]
    next: str | None = Field(description="Value of `after` for the next page; null on the last page.")


class Found(BaseModel):
    """An answer, and how certain it is."""

    answer: str
    logprob: float = Field(description="Mean log-probability of the tokens of the answer, in nats.")
    written: float | None = Field(
        description="Probability that the text says so; null if the model was not calibrated for this."
    )
    complete: bool = Field(description="Whether the answer ended by itself. If not, it was cut off.")

    @classmethod
    def of(cls, answer: Answer) -> Found:
        """Return what a client sees of an answer."""
        return cls(
            answer=answer.text,
            logprob=round(answer.logprob, 4),
            written=answer.written,
            complete=answer.finish_reason == "stop",
        )


class Chunk(BaseModel):
    """The write receipt of one chunk in short."""

    chunk: int
    tokens: int
    steps: int = Field(description="Write steps taken.")
    lost: int | None = Field(description="Tokens that the memory does not give back; null if this was not measured.")
    fidelity: dict[str, float] | None = Field(
        description="How well the memory answers compared with the whole text (`agreement`), and with none "
        "(`agreement_unwritten`); null if this was not measured."
    )

    @classmethod
    def of(cls, number: int, receipt: Receipt) -> Chunk:
        """Summarize a receipt."""
        return cls(
            chunk=number,
            tokens=receipt.context_tokens,
            steps=receipt.steps,
            lost=len(receipt.lost) if receipt.measured else None,
            fidelity=receipt.fidelity,
        )


class VersionSummary(BaseModel):
    """One version of a memory."""

    version: int
    created: str
    chunks: int
    tokens: int
    bytes: int


class Inspected(BaseModel):
    """A memory, its chunks and its versions."""

    memory: Stored
    method: str
    chunks: list[Chunk]
    versions: list[VersionSummary]
    receipts: str = Field(description="URI of the resource with the whole receipts.")

    @classmethod
    def of(cls, entry: Entry, versions: Sequence[Version], memory: Memory) -> Inspected:
        """Summarize a memory."""
        return cls(
            memory=Stored.of(entry),
            method=entry.method,
            chunks=[Chunk.of(number, receipt) for number, receipt in enumerate(memory.receipts, 1)],
            versions=[
                VersionSummary(
                    version=one.number,
                    created=f"{one.created:%Y-%m-%dT%H:%M:%SZ}",
                    chunks=one.rows,
                    tokens=one.tokens,
                    bytes=one.size,
                )
                for one in versions
            ],
            receipts=receipts_uri(entry.id),
        )


def receipts_uri(id: str) -> str:
    """Return the URI of the resource with the receipts of a memory."""
    return f"gradmem://memories/{id}/receipts"
