"""Tables of what a change of a document changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table


def chunks_table(chunks: Sequence[dict[str, Any]]) -> Table:
    """Build a table of the chunks, and whether their bytes are the same as before."""
    built = Table("chunk", "tokens", "bytes", title="chunks")
    for one in chunks:
        built.add_row(*map(str, one.values()))
    return built


def moved_table(moved: Sequence[Any]) -> Table:
    """Build a table of answers with their probabilities (see `Moved`), and the means over each memory's answers."""
    built = Table(title="probability of an answer, the geometric mean over its tokens")
    for heading in ("answer of", "question", "answer"):
        built.add_column(heading, overflow="fold")
    for heading in ("before", "after", "without any text"):
        built.add_column(heading, justify="right")
    for of in dict.fromkeys(one.of for one in moved):
        own = [one for one in moved if one.of == of]
        for one in own:
            built.add_row(of, one.question, one.answer, *_numbers([one]))
        built.add_row(of, "all", "", *_numbers(own), style="bold", end_section=True)
    return built


def _numbers(moved: Sequence[Any]) -> list[str]:
    columns = zip(*((one.before, one.after, one.unwritten) for one in moved), strict=True)
    return [f"{sum(column) / len(moved):.3f}" for column in columns]
