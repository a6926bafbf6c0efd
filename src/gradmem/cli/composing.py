"""`gradmem join`, `gradmem replace` and `gradmem forget`: documents whose chunks change."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradmem

from ..device import device_named
from ..errors import GradmemError
from ..files import write_bytes
from .composing_tables import chunks_table, moved_table
from .console import console, dumps, progress_bar, read_text


def join(
    memories: list[Path],
    output: Path = Path("joined.safetensors"),
    query: list[str] | None = None,
    checkpoint: str | None = None,
    json: bool = False,
    device: str = "auto",
) -> None:
    """Join memories of several documents into one, and show how their answers change.

    Parameters
    ----------
    memories
        Memory files that one model wrote with the same options, in the order of the document.
    output
        Memory file (short: -o).
    query
        Question by which to measure the change; give --query again for more. Default: twelve that fit any text.
    checkpoint
        Checkpoint that wrote the memories. Not needed for those that `gradmem list` shows.
    json
        Print JSON.
    device
        Device to run on: auto (an accelerator if there is one), cpu, cuda or cuda:1.
    """
    from ..model.changes import compared

    first = _opened(memories[0], checkpoint, device)
    opened = [first, *(first.model.open(path) for path in memories[1:])]
    joined = first.model.join(opened)
    saved, data = _saved(joined, memories[0], output)
    moved = [
        one
        for path, memory in zip(memories, opened, strict=True)
        for one in compared(path.name, memory, memory, saved, query or ())
    ]
    labels = [
        f"{path.name}, chunk {row + 1}"
        for path, memory in zip(memories, opened, strict=True)
        for row in range(len(memory))
    ]
    _show(output, data, _chunks(gradmem.Memory.join(opened), saved, labels), moved, json)


def replace(
    memory: Path,
    chunk: int,
    file: Path,
    output: Path = Path("replaced.safetensors"),
    query: list[str] | None = None,
    checkpoint: str | None = None,
    json: bool = False,
    device: str = "auto",
) -> None:
    """Write one chunk of a document anew, with the options of the others, and show what that changes.

    Parameters
    ----------
    memory
        Memory file.
    chunk
        Number of the chunk, as the write receipts show it; the first is 1.
    file
        Text of the new chunk; - for standard input.
    output
        Memory file (short: -o).
    query
        Question by which to measure the change; give --query again for more. Default: twelve that fit any text.
    checkpoint
        Checkpoint that wrote the memory. Not needed for those that `gradmem list` shows.
    json
        Print JSON.
    device
        Device to run on: auto (an accelerator if there is one), cpu, cuda or cuda:1.
    """
    from ..model.changes import compared
    from ..model.composing import row_of

    text, opened = read_text(file), _opened(memory, checkpoint, device)
    row = row_of(opened, chunk)
    saved, data = _saved(opened.model.replace(opened, row, text, progress=progress_bar), memory, output)
    moved = compared(f"new chunk {chunk}", saved.together([row]), opened, saved, query or ())
    if len(opened) > 1:
        others = opened.model.forget(opened, row)
        moved += compared("other chunks", others, opened, saved, query or ())
    labels = [f"chunk {number + 1}" for number in range(len(opened))]
    _show(output, data, _chunks(opened, saved, labels), moved, json)


def forget(
    memory: Path,
    chunk: int,
    output: Path = Path("forgotten.safetensors"),
    query: list[str] | None = None,
    checkpoint: str | None = None,
    json: bool = False,
    device: str = "auto",
) -> None:
    """Drop one chunk of a document, and verify by asking that it is gone.

    The chunk alone answers questions first. Its answers should then be no likelier than without any text.

    Parameters
    ----------
    memory
        Memory file.
    chunk
        Number of the chunk, as the write receipts show it; the first is 1.
    output
        Memory file (short: -o).
    query
        Question by which to verify it; give --query again for more. Default: twelve that fit any text.
    checkpoint
        Checkpoint that wrote the memory. Not needed for those that `gradmem list` shows.
    json
        Print JSON.
    device
        Device to run on: auto (an accelerator if there is one), cpu, cuda or cuda:1.
    """
    from ..model.changes import compared
    from ..model.composing import row_of

    opened = _opened(memory, checkpoint, device)
    row = row_of(opened, chunk)
    saved, data = _saved(opened.model.forget(opened, row), memory, output)
    moved = compared(f"forgotten chunk {chunk}", opened.together([row]), opened, saved, query or ())
    moved += compared("other chunks", saved, opened, saved, query or ())
    numbers = [number for number in range(len(opened)) if number != row]
    chunks = _chunks(opened.select(numbers), saved, [f"chunk {number + 1}" for number in numbers])
    chunks.insert(row, {"chunk": f"chunk {chunk}", "tokens": opened.receipts[row].context_tokens, "bytes": "forgotten"})
    _show(output, data, chunks, moved, json)


def _opened(path: Path, checkpoint: str | None, device: str) -> gradmem.BoundMemory:
    if not os.path.exists(path):
        raise GradmemError(f"no memory file at {path}; a stored memory becomes one by gradmem store export NAME -o M")
    opened = gradmem.open(path, checkpoint)
    if not opened.model.method.reads_together:
        raise GradmemError(
            f"{path} was written by {opened.receipts[0].method}, which does not read several chunks together: write "
            "the text with --method compact"
        )
    return opened.model.to(device_named(device)).bind(opened)


def _saved(memory: gradmem.BoundMemory, like: Path, output: Path) -> tuple[gradmem.BoundMemory, bytes]:
    """Save a memory in the precision of a file, and return it as it is read back."""
    from ..memory import read_bytes, stored_precision

    data = memory.to_bytes(stored_precision(read_bytes(like)))
    write_bytes(output, data)
    return memory.model.bind(gradmem.Memory.from_bytes(data)), data


def _chunks(before: gradmem.Memory, after: gradmem.Memory, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Say of each chunk how many tokens it has now, and whether its bytes are the same."""
    from ..model.changes import row_digests

    same = [one == other for one, other in zip(row_digests(before), row_digests(after), strict=True)]
    return [
        {"chunk": label, "tokens": receipt.context_tokens, "bytes": "same" if kept else "changed"}
        for label, receipt, kept in zip(labels, after.receipts, same, strict=True)
    ]


def _show(output: Path, data: bytes, chunks: list[dict[str, Any]], moved: Sequence[Any], json: bool) -> None:
    if json:
        print(dumps({"file": str(output), "bytes": len(data), "chunks": chunks, "answers": [vars(o) for o in moved]}))
        return
    console.print(chunks_table(chunks), moved_table(moved))
    console.print(f"saved {output}: {len(data)} bytes", markup=False, highlight=False, soft_wrap=True)
