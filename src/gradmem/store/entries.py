"""Entries, versions and comparisons: what a store returns about its memories."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from itertools import chain
from typing import Any, TypedDict

from ..choices import Precision
from ..receipts import Receipt

CURSOR = "%Y%m%dT%H%M%S.%f"
"""Format of the time in a cursor."""


@dataclass(frozen=True)
class Version:
    """One version of a memory: its size, and the sums of the write receipts of its rows.

    Attributes
    ----------
    number : int
        Counts from 1.
    created : datetime
        UTC.
    precision : {"float32", "float16", "int8"}
        Precision of the stored file.
    rows : int
        Number of memories in the file: one for each text, or for each chunk of a text.
    tokens, kept, unmeasured : int
        Number of context tokens, of those that the memory keeps, and of those that were not measured again after more
        text was written into the same vectors.
    answers, at_risk : int or None
        Number of answers in the texts that the task knows, and of those that may be wrong. None if some were not
        measured.
    loss_before, loss_after : float
        Write loss of the unwritten memory and of this one: mean nats per measured token.
    size : int
        Bytes of the stored file.
    sha256 : str
        SHA-256 of the stored file.
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
        """Return the version as JSON data."""
        return to_json(asdict(self))


@dataclass(frozen=True)
class Entry:
    """A stored memory, without its tensors.

    Attributes
    ----------
    id : str
        128 random bits in 32 hexadecimal digits.
    name : str or None
        Unique among the memories of its owner.
    tags : tuple of str
        Sorted.
    pinned : bool
        Whether it cannot be deleted.
    model, checkpoint : str
        Name and fingerprint of the checkpoint that wrote it.
    method : str
        Name of the method.
    created, updated : datetime
        Times in UTC. Every change of the name, the tags, the pin or the version sets `updated`.
    current : Version
        The version that is read by default.
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
        """The position after this memory in a listing. It stays valid if the memory is deleted."""
        return f"{self.created:{CURSOR}}_{self.id}" + (f"_{self.name}" if self.name else "")

    @property
    def label(self) -> str:
        """The name, or the id if there is no name."""
        return self.name or self.id

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as JSON data."""
        return to_json({**asdict(self), "cursor": self.cursor})

    @classmethod
    def read(cls, data: dict[str, Any]) -> Entry:
        """Build an entry from the JSON data of `to_dict`."""
        values = {field.name: data[field.name] for field in fields(cls)}
        times = {name: _moment(data[name]) for name in ("created", "updated")}
        current = Version(**{**data["current"], "created": _moment(data["current"]["created"])})
        return cls(**{**values, **times, "tags": tuple(data["tags"]), "current": current})


class Changes(TypedDict, total=False):
    """Changes of a memory. Whatever is not given stays as it is."""

    name: str | None
    tags: str | Sequence[str]
    pinned: bool


@dataclass(frozen=True)
class Diff:
    """Which tokens of one version another version keeps.

    Attributes
    ----------
    before, after : Version
    lost, regained : list of tuple of int
        Row and position of the tokens that only `before` keeps, and of those that only `after` keeps. Positions of
        appended text continue those of the earlier text. Only tokens of both versions are compared.
    added : int
        Number of tokens of `after` that `before` does not have.
    unmeasured : int
        Number of tokens of both versions that were not measured in one of them.
    """

    before: Version
    after: Version
    lost: list[tuple[int, int]]
    regained: list[tuple[int, int]]
    added: int
    unmeasured: int

    @classmethod
    def of(cls, before: Version, after: Version, receipts: tuple[Sequence[Receipt], Sequence[Receipt]]) -> Diff:
        """Compare two versions by their receipts."""
        old, new = (dict(_tokens(side)) for side in receipts)
        both = [token for token in old if token in new]
        lost = [token for token in both if old[token] is True and new[token] is False]
        regained = [token for token in both if new[token] is True and old[token] is False]
        unmeasured = sum(None in (old[token], new[token]) for token in both)
        return cls(before, after, lost, regained, len(new.keys() - old.keys()), unmeasured)

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON data."""
        return to_json(asdict(self))


def _tokens(receipts: Sequence[Receipt]) -> Iterator[tuple[tuple[int, int], bool | None]]:
    """Yield row and position of each token, and whether it is kept (None if that was not measured)."""
    for row, receipt in enumerate(receipts):
        kept = chain.from_iterable(
            [loss <= Receipt.LOST if part.measured else None for loss in part.token_losses] for part in receipt.history
        )
        yield from (((row, position), own) for position, own in enumerate(kept))


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))  # Python 3.10 does not know Z


def to_json(value: Any) -> Any:
    """Replace times by their ISO 8601 form."""
    if isinstance(value, dict):
        return {key: to_json(one) for key, one in value.items()}
    return value.isoformat() if isinstance(value, datetime) else value
