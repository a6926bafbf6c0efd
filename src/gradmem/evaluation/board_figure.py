"""The figure of the board: what is kept, by the bytes of the memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from .board_rows import FULL, NONE, SWAPPED, Row
from .figures import figure

COLOURS = ("#0058a3", "#b8420b", "#00735c", "#8b2f87", "#6a5a00", "#a3123f", "#3d5afe", "#5b4636", "#007a99", "#555555")
"""Colours of lines: each has a contrast of at least 4.5 to white."""
MARKERS = "osD^vP<X>"
DASHES = ("-", "--", "-.", ":")
ENDS = {FULL: ("#000000", "-"), NONE: ("#555555", "--")}
"""Colour and dashes of the ends of the scale, which are lines across the panels."""
PANELS = {"gap_closed": "gap closed, %", "exact_match": "exact match, %"}


def board_figure(rows: Sequence[Row], path: Path, title: str) -> Path:
    """Draw the gap that is closed, and exact match, by bytes of the memory.

    Parameters
    ----------
    rows : sequence of dict
        As `rows_of` makes them; rows of other programs may follow.
    path : Path
    title : str
    """
    lines = {name: [row for row in rows if row["writer"] == name] for name in dict.fromkeys(r["writer"] for r in rows)}
    ends = {name: lines.pop(name)[0] for name in (FULL, NONE) if name in lines}
    with figure(path, rows=2, height=3.6 + 0.08 * len(lines), sharex=True) as axes:
        for axis, (score, label) in zip(axes, PANELS.items(), strict=True):
            for name, row in ends.items():
                colour, dashes = ENDS[name]
                # Both ends of the scale are known where the gap is shown.
                shown = _about(name, row) if score == "exact_match" else None
                axis.axhline(100 * row[score], color=colour, linestyle=dashes, linewidth=1, label=shown)
            for (name, own), style in zip(lines.items(), _styles(lines), strict=False):
                own = sorted(own, key=lambda row: row["bytes"])
                axis.errorbar([row["bytes"] for row in own], *_percent(own, score), label=name, capsize=2, **style)
            low, high = axis.get_ylim()
            axis.set(xscale="log", ylabel=label, ylim=(min(low, -3), max(high, 10)))
            axis.grid(axis="y", color="0.9", linewidth=0.6)
            axis.set_axisbelow(True)
        _ticks(axes[1], [row["bytes"] for own in lines.values() for row in own])
        axes[0].set_title("\n".join(wrap(title, 90)), fontsize=9)
        axes[1].set_xlabel("bytes of the memory, mean over texts")
        handles, labels = axes[1].get_legend_handles_labels()
        axes[0].figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return path


def _styles(lines: dict[str, list[Row]]) -> Iterator[dict[str, Any]]:
    """A style for each line; the control is grey and dotted, and has no colour of the others."""
    number = 0
    for name in lines:
        if name == SWAPPED:
            yield {"color": "#555555", "linestyle": ":", "marker": "x", "linewidth": 1}
            continue
        yield {
            "color": COLOURS[number % len(COLOURS)],
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": DASHES[number // len(COLOURS) % len(DASHES)],
            "markersize": 5,
            "linewidth": 1.4,
            "elinewidth": 0.8,
        }
        number += 1


def _percent(own: Sequence[Row], score: str) -> tuple[list[float], list[list[float]]]:
    """Values and the lengths of their bars down and up, in percent."""
    bounds = [row[f"{score}_ci95"] for row in own]
    down = [100 * max(0.0, row[score] - low) for row, (low, _) in zip(own, bounds, strict=True)]
    up = [100 * max(0.0, high - row[score]) for row, (_, high) in zip(own, bounds, strict=True)]
    return [100 * row[score] for row in own], [down, up]


def _about(name: str, row: Row) -> str:
    what = {FULL: "whole cache", NONE: "no text"}[name]
    return f"{name}: {what}" + (f", {_size(row['bytes'])}" if name == FULL else "")


def _ticks(axis: Any, sizes: Sequence[int]) -> None:
    """Label the axis at powers of two of a megabyte, of which a few are in view."""
    if not sizes:
        return
    low, high = min(sizes), max(sizes)
    ticks = [10**6 * 2**power for power in range(-12, 14)]
    inside = [tick for tick in ticks if low / 2 <= tick <= high * 2]
    axis.set_xticks(inside, [_size(tick) for tick in inside])
    axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)


def _size(count: float) -> str:
    return f"{count / 1e6:.3g} MB" if count >= 1e6 else f"{count / 1e3:.3g} KB"
