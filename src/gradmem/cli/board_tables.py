"""The table of the board."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from ..evaluation.board_rows import FULL, NONE, SWAPPED
from .evaluation_tables import percent_interval

CONTROLS = (FULL, NONE, SWAPPED)
HEADINGS = (
    "writer",
    "budget",
    "KB",
    "gap closed %",
    "KL",
    "agreement %",
    "EM %",
    "F1 %",
    "F1 to full %",
    "write s",
    "query ms",
    "break-even",
)


def board_table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """Make the table of the rows of the board."""
    built = Table(
        title=title,
        caption="gap closed: part of the KL divergence without the text (none) that the memory removes; KL in nats per "
        "token and agreement of the likeliest token, along the answers with the whole text (full); EM and F1 by the "
        "references, F1 to full by the answers with the whole text; break-even: questions from which writing once "
        "takes less time than reading the text for each; 95 % intervals bootstrapped over texts",
        pad_edge=False,
        collapse_padding=True,
    )
    for heading in HEADINGS:
        built.add_column(heading, justify="left" if heading == "writer" else "right", no_wrap=heading == "writer")
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        name = row["writer"]
        built.add_row(
            name,
            f"{row['budget']:g}",
            f"{row['bytes'] / 1000:,.1f}",
            _percent(row, "gap_closed"),
            f"{row['kl']:.3f}",
            f"{100 * row['agreement']:.1f}",
            _percent(row, "exact_match"),
            f"{100 * row['f1']:.1f}",
            f"{100 * row['f1_full']:.1f}",
            f"{row['write_seconds']:.2f}",
            f"{row['query_ms']:.0f}",
            "" if name in CONTROLS else "never" if row["break_even"] is None else f"{row['break_even']:,}",
            style="dim" if name in (NONE, SWAPPED) else None,
            end_section=after is None or after["writer"] != name,
        )
    return built


def _percent(row: dict[str, Any], score: str) -> str:
    return f"{100 * row[score]:.1f} ({percent_interval(row[f'{score}_ci95'], 1)})"
