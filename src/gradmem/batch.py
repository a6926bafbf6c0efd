"""Token batches: what tasks make and methods read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

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
        True at real tokens; the real tokens of a row come first.
    """

    ids: Tensor
    mask: Tensor

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
        """Number of real tokens in each row, shape (batch,)."""
        return self.mask.sum(1)

    def __getitem__(self, rows: Tensor | slice) -> Tokens:
        return Tokens(self.ids[rows], self.mask[rows])

    def to(self, device: torch.device | str) -> Tokens:
        """Move to a device."""
        return Tokens(self.ids.to(device), self.mask.to(device))


@dataclass
class Batch:
    """Contexts to write, and queries with their targets to read.

    A context may have any number of queries: `rows` says which context each one asks.

    Attributes
    ----------
    context : Tokens, shape (contexts, length)
    queries : Tokens, shape (queries, length)
        Query and target tokens in one row.
    labels : Tensor, int64, shape (queries, length)
        The target tokens at their own positions (not shifted), -100 elsewhere.
    rows : Tensor, int64, shape (queries,)
        Index of the context that each query belongs to.
    references : list of list of str
        All answers to each query that count as right, where generated answers are judged as text; or nothing.
    """

    context: Tokens
    queries: Tokens
    labels: Tensor
    rows: Tensor
    references: list[list[str]] = field(default_factory=list)

    def to(self, device: torch.device | str) -> Batch:
        """Move to a device."""
        moved = self.context.to(device), self.queries.to(device), self.labels.to(device), self.rows.to(device)
        return Batch(*moved, self.references)

    def prompts(self) -> list[list[int]]:
        """Token ids of each query before its target."""
        lengths = (self.labels != -100).long().argmax(1).tolist()
        return [ids[:length].tolist() for ids, length in zip(self.queries.ids, lengths, strict=True)]

    def split(self, size: int) -> Iterator[Batch]:
        """Parts of up to `size` contexts, each with its queries; sizes differ by at most one.

        A part without queries trains nothing and is left out; so are references, which training does not look at.
        """
        count = -(-len(self.context) // size)
        for contexts in torch.arange(len(self.context), device=self.rows.device).tensor_split(count):
            start, stop = int(contexts[0]), int(contexts[-1]) + 1
            mine = (self.rows >= start) & (self.rows < stop)
            if mine.any():
                yield Batch(self.context[start:stop], self.queries[mine], self.labels[mine], self.rows[mine] - start)
