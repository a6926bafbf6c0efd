"""Tokenized contexts with their queries, in flat arrays that may be memory-mapped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch

from ..batch import Batch, Tokens
from ..errors import GradmemError


@dataclass
class Query:
    """A query with its target.

    Attributes
    ----------
    ids : sequence of int
        Tokens of the query and the target.
    target : int
        Index of the first target token.
    references : list of str
        All right answers, for tasks that compare generated answers as text.
    """

    ids: Sequence[int] | np.ndarray
    target: int
    references: list[str] = field(default_factory=list)


@dataclass
class Sample:
    """Token ids of a context, and its queries."""

    context: Sequence[int] | np.ndarray
    queries: list[Query]


@dataclass
class Samples:
    """Any number of samples in flat arrays.

    Attributes
    ----------
    arrays : dict of array
        `context` and `query`: the token ids of all contexts and of all queries. `context_end` (contexts,) and
        `query_end` (queries,): the end of each in these. `target` (queries,): the index of the first target token in
        each query. `queries_end` (contexts,): the number of queries of all contexts up to this one.
    references : list of list of str
        The references of each query, or an empty list.
    notes : list of str
        Sentences for users that say what was cut or left out.
    """

    arrays: dict[str, np.ndarray]
    references: list[list[str]]
    notes: list[str]

    @classmethod
    def build(cls, samples: Iterable[Sample], notes: Iterable[str] = ()) -> Samples:
        """Flatten samples. `notes` may be a list that grows while `samples` are read."""
        contexts: list[np.ndarray] = []
        queries: list[Query] = []
        counts: list[int] = []
        for sample in samples:
            contexts.append(np.asarray(sample.context, dtype=np.int32))
            queries += sample.queries
            counts.append(len(sample.queries))
        rows = [np.asarray(query.ids, dtype=np.int32) for query in queries]
        arrays = {
            "context": _concatenated(contexts),
            "context_end": np.cumsum([len(row) for row in contexts], dtype=np.int64),
            "query": _concatenated(rows),
            "query_end": np.cumsum([len(row) for row in rows], dtype=np.int64),
            "target": np.array([query.target for query in queries], dtype=np.int32),
            "queries_end": np.cumsum(counts, dtype=np.int64),
        }
        references = [query.references for query in queries]
        return cls(arrays, references if any(references) else [], list(notes))

    def __len__(self) -> int:
        return len(self.arrays["context_end"])

    def __getitem__(self, index: int) -> Sample:
        first, last = self.span("queries_end", index)
        return Sample(self.tokens("context", index), [self.query(number) for number in range(first, last)])

    def query(self, number: int) -> Query:
        """Return a query by its index among the queries of all contexts."""
        references = self.references[number] if self.references else []
        return Query(self.tokens("query", number), int(self.arrays["target"][number]), references)

    def tokens(self, name: str, index: int) -> np.ndarray:
        """Return the token ids of a `context` or a `query`."""
        first, last = self.span(f"{name}_end", index)
        return self.arrays[name][first:last]

    def span(self, name: str, index: int) -> tuple[int, int]:
        """Return begin and end of item `index`, given the array of ends; for `queries_end` the queries of a context."""
        ends = self.arrays[name]
        return (int(ends[index - 1]) if index else 0), int(ends[index])


def collate(samples: Sequence[Sample], pad_id: int) -> Batch:
    """Make a batch: contexts and queries padded on the right, labels at the target tokens only."""
    queries = [query for sample in samples for query in sample.queries]
    tokens = Tokens.from_lists([np.array(query.ids, dtype=np.int64) for query in queries], pad_id)
    targets = torch.tensor([query.target for query in queries], dtype=torch.long)
    wanted = tokens.mask & (torch.arange(tokens.ids.shape[1]) >= targets[:, None])
    return Batch(
        Tokens.from_lists([np.array(sample.context, dtype=np.int64) for sample in samples], pad_id),
        tokens,
        tokens.ids.masked_fill(~wanted, -100),
        torch.arange(len(samples)).repeat_interleave(torch.tensor([len(sample.queries) for sample in samples])),
        [query.references for query in queries],
    )


def split_indices(split: str, start: int, count: int, size: int, seed: int, shuffled: bool = False) -> np.ndarray:
    """Return the indices of samples `start` to `start + count` of a split.

    Training repeats the split, each time in a new random order. The other splits end after `size` samples; their order
    is that of the files, or a random one if `shuffled`.

    Parameters
    ----------
    split : {"train", "valid", "test"}
    start, count : int
    size : int
        Number of samples in the split.
    seed : int
        Of the orders of training.
    shuffled : bool

    Raises
    ------
    GradmemError
        If the split is empty, or a split other than training has fewer samples.
    """
    if not size or (split != "train" and start + count > size):
        raise GradmemError(f"the {split} split has {size} samples: samples {start} to {start + count} do not exist")
    wanted = np.arange(start, start + count)
    if split != "train":
        return _order(size, 0, 0)[wanted] if shuffled else wanted
    rounds = wanted // size
    return np.concatenate([_order(size, seed, int(n))[wanted[rounds == n] % size] for n in np.unique(rounds)])


@lru_cache(maxsize=8)
def _order(size: int, seed: int, number: int) -> np.ndarray:
    return np.random.default_rng([seed, number]).permutation(size)


def _concatenated(rows: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(rows) if rows else np.zeros(0, dtype=np.int32)
