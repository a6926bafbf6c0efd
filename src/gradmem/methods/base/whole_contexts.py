"""What a method does with chunks, if it writes contexts whole and reads the rows of a memory one by one."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ...batch import Tokens
from ...errors import GradmemError
from ...memory import Memory
from .chunks import ChunkMode
from .written import Written


class WholeContexts(nn.Module):
    """Base of methods: what those override that write several chunks into one memory, or read rows together."""

    def chunk_by(self, chunk_size: int | None, chunk_mode: ChunkMode | None = None) -> None:
        """Set how contexts are split into chunks. Memories that were written before are read as before.

        Parameters
        ----------
        chunk_size : int or None
            Most tokens of a chunk; None to write contexts whole.
        chunk_mode : {"sequential", "growing", "independent", "joint", "parallel"}, optional
            By default the mode does not change.

        Raises
        ------
        GradmemError
            If a chunk is too long, or the method only writes contexts whole.
        """
        raise self._whole_only()

    def chunk_lengths(self, context: Tokens) -> list[list[int]]:
        """Count the tokens of each chunk of each context; an empty list for a context that is written whole."""
        return [[] for _ in range(len(context))]

    def extend(self, memory: Memory, context: Tokens, steps: int, *, until: float | None = None) -> Iterator[Written]:
        """Write more text into memories; yield what is written, before the first step and after every step.

        Parameters
        ----------
        memory : Memory
            One row for each context.
        context, steps, until
            As for `trajectory`.

        Raises
        ------
        GradmemError
            As `trajectory`, or if nothing more can be written into the memory.
        """
        raise self._whole_only()

    def merge(self, memory: Memory, more: Memory) -> Memory:
        """Combine a memory with the last result of `extend` for it."""
        raise self._whole_only()

    def choose(self, memory: Memory, query: list[int]) -> list[int]:
        """Choose the rows that a query (token ids) reads, if the method `reads_together`; by default all."""
        return list(range(len(memory)))

    def together(self, memory: Memory) -> Memory:
        """Put all rows into one row, which a query reads as one text, if the method `reads_together`."""
        raise NotImplementedError

    def split_chunks(self, memory: Memory) -> Memory:
        """Make each chunk that has vectors of its own a row; by default a row is one chunk."""
        return memory

    def _whole_only(self) -> GradmemError:
        name = type(self).__name__
        return GradmemError(f"{name} writes a context whole: write all text at once, or use gradmem or rmt")
