"""Put the chunks of several memories into one, and replace or drop one of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import GradmemError
from ..memory import Memory
from .checkpoint_model import CheckpointModel


def row_of(memory: Memory, chunk: int) -> int:
    """Row of a chunk by its number, which counts from 1.

    Raises
    ------
    GradmemError
        If there is no such chunk.
    """
    if not 1 <= chunk <= len(memory):
        chunks = f"chunks 1 to {len(memory)}" if len(memory) > 1 else "one chunk, number 1"
        raise GradmemError(f"there is no chunk {chunk}: the memory has {chunks}")
    return chunk - 1


def check_together(model: CheckpointModel) -> None:
    """Raise `GradmemError` unless the method reads the rows of a memory together."""
    if not model.method.reads_together:
        name = model.spec["method"]["name"]
        raise GradmemError(f"{name} does not read several chunks together: write the text with --method compact")


def joined(memories: Sequence[Memory], models: Sequence[CheckpointModel]) -> Memory:
    """Put the chunks of several memories into one, in this order.

    Raises
    ------
    GradmemError
        If there are none, the method does not read chunks together, or they were written with different options.
    """
    if not memories:
        raise GradmemError("there is no memory to join")
    first = models[0]
    for model in models:
        check_together(model)
        if model.fingerprints != first.fingerprints or model.method_options != first.method_options:
            options = " and ".join(_shown(one.method_options) for one in (first, model))
            raise GradmemError(f"the memories were written with different options ({options}): join those of one kind")
    return Memory.join(memories)


def replaced(memory: Memory, row: int, other: Memory) -> Memory:
    """Put another row in the place of one."""
    rows = [*range(len(memory))]
    return Memory.join(
        [part for part in (memory.select(rows[:row]), other, memory.select(rows[row + 1 :])) if len(part)]
    )


def without(memory: Memory, row: int) -> Memory:
    """Drop a row.

    Raises
    ------
    GradmemError
        If it is the only one.
    """
    if len(memory) == 1:
        raise GradmemError("the memory has one chunk, and without it nothing is left: delete the memory")
    return Memory.join([memory.select([other for other in range(len(memory)) if other != row])])


def _shown(options: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items()) or "none"
