"""Batches of tokens: what tasks make and methods read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor


@dataclass
class Tokens:
    """Token ids, padded on the right.

    Attributes
    ----------
    ids : Tensor, int64, shape (batch, length)
    mask : Tensor, bool, shape (batch, length)
        True at tokens, False at padding. The tokens of a row come first.
    host : Tokens, optional
        The same tokens on the CPU, if they were moved from there. Reading values from a device would wait for all of
        its work.
    """

    ids: Tensor
    mask: Tensor
    host: Tokens | None = field(default=None, repr=False, compare=False)

    @classmethod
    def from_lists(cls, rows: Sequence[Sequence[int] | np.ndarray], pad_id: int = 0) -> Tokens:
        """Pad lists of ids on the right with `pad_id`."""
        length = max((len(row) for row in rows), default=0)
        ids = torch.full((len(rows), length), pad_id, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.as_tensor(row, dtype=torch.long)
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
        return cls(ids, torch.arange(length)[None] < lengths[:, None])

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def lengths(self) -> Tensor:
        """Number of tokens in each row, shape (batch,)."""
        return self.mask.sum(1)

    @property
    def values(self) -> Tokens:
        """The same tokens where reading values is cheap: on the CPU, if they came from there."""
        return self if self.host is None else self.host

    def __getitem__(self, rows: Tensor | slice) -> Tokens:
        known = isinstance(rows, slice) or rows.device.type == "cpu"
        host = self.host[rows] if self.host is not None and known else None
        own = rows if isinstance(rows, slice) else rows.to(self.ids.device, non_blocking=True)
        return Tokens(self.ids[own], self.mask[own], host)

    def to(self, device: torch.device | str) -> Tokens:
        """Move to a device."""
        host = self.values if self.values.ids.device.type == "cpu" else None
        moved = Tokens(self.ids.to(device, non_blocking=True), self.mask.to(device, non_blocking=True))
        return moved if moved.ids.device.type == "cpu" else replace(moved, host=host)


@dataclass
class Batch:
    """Contexts to write, and queries with their targets to read.

    A context may have any number of queries; `rows` says to which context each query belongs.

    Attributes
    ----------
    context : Tokens, shape (contexts, length)
    queries : Tokens, shape (queries, length)
        The tokens of a query, and after them those of its target.
    labels : Tensor, int64, shape (queries, length)
        The target tokens at their own positions (not shifted), -100 elsewhere.
    rows : Tensor, int64, shape (queries,)
        Index of the context that each query belongs to.
    references : list of list of str
        All right answers to each query, for tasks that compare generated answers as text; or an empty list.
    targets : Tensor, int64, shape (targets,)
        Indices of the target tokens in the flattened labels, in order. They are computed on the CPU when the batch is
        made: a search on a device would wait for all of its work.
    most : int
        The largest number of queries of a context; computed likewise.
    """

    context: Tokens
    queries: Tokens
    labels: Tensor
    rows: Tensor
    references: list[list[str]] = field(default_factory=list)
    targets: Tensor = field(default=None)  # type: ignore[assignment]
    most: int = -1

    def __post_init__(self) -> None:
        if self.targets is None:
            self.targets = (self.labels != -100).flatten().nonzero()[:, 0]
        if self.most < 0:
            self.most = int(self.rows.bincount().max()) if len(self.rows) else 0

    def to(self, device: torch.device | str) -> Batch:
        """Move to a device."""
        labels, rows, targets = (t.to(device, non_blocking=True) for t in (self.labels, self.rows, self.targets))
        context, queries = self.context.to(device), self.queries.to(device)
        return Batch(context, queries, labels, rows, self.references, targets, self.most)

    @property
    def answers(self) -> Tensor:
        """The target tokens of all queries, in order, int64, shape (targets,)."""
        return self.labels.flatten()[self.targets]

    def prompts(self) -> list[list[int]]:
        """Return the token ids of each query, without its target."""
        lengths = (self.labels != -100).long().argmax(1).tolist()
        return [ids[:length].tolist() for ids, length in zip(self.queries.values.ids, lengths, strict=True)]

    def split(self, size: int) -> Iterator[Batch]:
        """Split into parts of up to `size` contexts, with their queries; the sizes differ by at most one.

        A part without queries is left out, since it trains nothing. The parts have no references, which training does
        not use.
        """
        count = -(-len(self.context) // size)
        for contexts in torch.arange(len(self.context), device=self.rows.device).tensor_split(count):
            start, stop = int(contexts[0]), int(contexts[-1]) + 1
            mine = (self.rows >= start) & (self.rows < stop)
            if mine.any():
                yield Batch(self.context[start:stop], self.queries[mine], self.labels[mine], self.rows[mine] - start)
