"""What a store says of its memories."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from itertools import chain
from typing import Any, TypedDict

from ..choices import Precision
from ..receipts import Receipt

CURSOR = "%Y%m%dT%H%M%S.%f"
"""A time as it stands in a cursor."""


@dataclass(frozen=True)
class Version:
    """One version of a memory: its size and, summed over its rows, its write receipt.

    Attributes
    ----------
    number : int
        From 1.
    created : datetime
        UTC.
    precision : {"float32", "float16", "int8"}
        Of the stored file.
    rows : int
        Texts, or chunks of a text, with a memory each.
    tokens, kept, unmeasured : int
        Context tokens, those among them that the memory keeps, and those of which nobody knows: more was written into
        the same vectors since, and they were not measured anew.
    answers, at_risk : int or None
        Answers that the texts give, as far as the task can tell, and those among them that may come out wrong; None
        where some of that was not measured.
    loss_before, loss_after : float
        Write loss of the unwritten memory and of this one, mean nats per token that was measured.
    size : int
        Bytes of the stored file.
    sha256 : str
        Checksum of the stored file.
    """

    number: int
    created: datetime
    precision: Precision
    rows: int
    tokens: int
    kept: int
    unmeasured: int
    answers: int | None
    at_risk: int | None
    loss_before: float
    loss_after: float
    size: int
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        """The version as plain data for JSON."""
        return plain(asdict(self))


@dataclass(frozen=True)
class Entry:
    """A memory in a store.

    Attributes
    ----------
    id : str
        128 random bits in 32 hexadecimal digits.
    name : str or None
        Unique among the memories of its owner.
    tags : tuple of str
        Sorted.
    pinned : bool
        Whether it is safe from being deleted.
    model, checkpoint : str
        Name and fingerprint of the checkpoint that wrote it.
    method : str
        Name of the method.
    created, updated : datetime
        UTC; the latter changes with names, tags, pins and versions.
    current : Version
        The version that is read.
    """

    id: str
    name: str | None
    tags: tuple[str, ...]
    pinned: bool
    model: str
    checkpoint: str
    method: str
    created: datetime
    updated: datetime
    current: Version

    @property
    def cursor(self) -> str:
        """Where a listing goes on after this memory, also when the memory is gone by then."""
        return f"{self.created:{CURSOR}}_{self.id}"

    @property
    def label(self) -> str:
        """The name, or the id where there is none."""
        return self.name or self.id

    def to_dict(self) -> dict[str, Any]:
        """The entry as plain data for JSON."""
        return plain({**asdict(self), "cursor": self.cursor})

    @classmethod
    def read(cls, row: dict[str, Any]) -> Entry:
        """The entry that `row` made plain data of."""
        about = {field.name: row[field.name] for field in fields(cls)}
        times = {name: _moment(row[name]) for name in ("created", "updated")}
        current = Version(**{**row["current"], "created": _moment(row["current"]["created"])})
        return cls(**{**about, **times, "tags": tuple(row["tags"]), "current": current})


class Changes(TypedDict, total=False):
    """What is to be another of a memory; what is not given stays."""

    name: str | None
    tags: str | Sequence[str]
    pinned: bool


@dataclass(frozen=True)
class Diff:
    """What became of the tokens of one version in another.

    Attributes
    ----------
    before, after : Version
    lost, regained : list of tuple of int
        Row of the memory and position in its text of the tokens that `before` keeps and `after` does not, and the other
        way round. What was appended counts on from what was there before; only what both versions have is compared.
    added : int
        Tokens of `after` that `before` has not.
    unmeasured : int
        Tokens of both of which one version does not know whether it keeps them: neither lost nor kept.
    """

    before: Version
    after: Version
    lost: list[tuple[int, int]]
    regained: list[tuple[int, int]]
    added: int
    unmeasured: int

    @classmethod
    def of(cls, before: Version, after: Version, receipts: tuple[Sequence[Receipt], Sequence[Receipt]]) -> Diff:
        """Compare the receipts of two versions."""
        old, new = (dict(_tokens(side)) for side in receipts)
        both = [place for place in old if place in new]
        lost = [place for place in both if old[place] is True and new[place] is False]
        regained = [place for place in both if new[place] is True and old[place] is False]
        unmeasured = sum(None in (old[place], new[place]) for place in both)
        return cls(before, after, lost, regained, len(new.keys() - old.keys()), unmeasured)

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain data for JSON."""
        return plain(asdict(self))


def _tokens(receipts: Sequence[Receipt]) -> Iterator[tuple[tuple[int, int], bool | None]]:
    """Place of each token, and whether it is kept; None where that was not measured."""
    for row, receipt in enumerate(receipts):
        kept = chain.from_iterable(
            [loss <= Receipt.LOST if part.measured else None for loss in part.token_losses] for part in receipt.history
        )
        yield from (((row, position), own) for position, own in enumerate(kept))


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))  # Python 3.10 does not know Z


def plain(value: Any) -> Any:
    """Times as ISO 8601, everything else as it is."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return value.isoformat() if isinstance(value, datetime) else value
