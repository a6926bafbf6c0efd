"""Figures of a comparison: exact match by pairs, bytes and cost of a write; time of many queries; training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..evaluation.figures import figure
from .compare import Entry
from .published import by_pairs

ASKED = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
"""Numbers of queries in the figure of the time."""


def draw_all(entries: Sequence[Entry], directory: Path) -> list[Path]:
    """Draw all figures of a comparison into a directory, and return their paths."""
    return [
        comparison_by_pairs(entries, directory / "pairs.png"),
        comparison_by_bytes(entries, directory / "bytes.png"),
        comparison_by_flops(entries, directory / "flops.png"),
        comparison_by_minutes(entries, directory / "training.png"),
        comparison_by_queries(entries, directory / "cost.png"),
    ]


def comparison_by_pairs(entries: Sequence[Entry], path: Path) -> Path:
    """Draw exact match by pairs: these systems solid, the published ones dashed (figure 1 of the paper)."""
    with figure(path) as axis:
        by_pairs(axis, _pairs(entries), _about(entries))
        for name, mine in _by_system(entries):
            axis.plot(_pairs(mine), _match(mine), marker="o", label=name)
        axis.legend(frameon=False, fontsize=7)
    return path


def comparison_by_bytes(entries: Sequence[Entry], path: Path) -> Path:
    """Draw exact match by bytes of memory, one panel for each number of pairs."""
    sizes = sorted(set(_pairs(entries)))
    columns = min(len(sizes), 3)
    rows = math.ceil(len(sizes) / columns)
    with figure(path, rows, 2.4, ncols=columns, sharex=True, sharey=True, squeeze=False) as axes:
        panels = axes.ravel()
        for axis, pairs in zip(panels, sizes, strict=False):
            for number, (name, mine) in enumerate(_by_system(entries)):
                shown = [entry for entry in mine if entry.result.task["pairs"] == pairs]
                # Later markers are smaller, so that markers at the same point stay visible.
                style = {"marker": "osD^v<>"[number % 7], "markersize": max(4, 10 - 2 * number), "linestyle": "none"}
                axis.plot([entry.cost.bytes for entry in shown], _match(shown), label=name, **style)
            axis.set_title(f"{pairs} pairs", fontsize=9)
        for axis in panels[len(sizes) :]:
            axis.set_axis_off()
        first = panels[0]
        first.set_xscale("log", base=2)
        first.set_ylim(-5, 105)
        first.legend(frameon=False, fontsize=7)
        first.figure.supxlabel(f"bytes of memory (float32); {_about(entries)}", fontsize=9)
        first.figure.supylabel("exact match, %", fontsize=9)
    return path


def comparison_by_flops(entries: Sequence[Entry], path: Path) -> Path:
    """Draw exact match by the cost of a write; the points are labelled with their number of pairs."""
    with figure(path) as axis:
        for name, mine in _by_system(entries):
            xs = [entry.cost.write_flops / 1e9 for entry in mine]
            axis.plot(xs, _match(mine), marker="o", label=name)
            for pairs, x, match in zip(_pairs(mine), xs, _match(mine), strict=True):
                axis.annotate(f" {pairs}", (x, match), fontsize=7)
        axis.set_xscale("log", base=2)
        axis.set(xlabel="GFLOP of a write", ylabel="exact match, %", ylim=(-3, 103))
        axis.set_title(f"by number of pairs (at the points); {_about(entries)}", fontsize=9)
        axis.legend(frameon=False, fontsize=7)
    return path


def comparison_by_queries(entries: Sequence[Entry], path: Path) -> Path:
    """Draw the time of writing a context with the most pairs once and asking it many queries."""
    most = max(_pairs(entries))
    mine = [entry for entry in entries if entry.result.task["pairs"] == most]
    with figure(path) as axis:
        for entry in mine:
            cost = entry.cost
            times = [cost.write_seconds + n * cost.query_seconds for n in ASKED]
            axis.plot(ASKED, times, marker="o", label=entry.result.checkpoint)
        full = mine[0].reference
        again = [n * (full.write_seconds + full.query_seconds) for n in ASKED]
        kept = [full.write_seconds + n * full.query_seconds for n in ASKED]
        axis.plot(ASKED, again, "k--", label="context read again for each query")
        axis.plot(ASKED, kept, "k:", label="KV-cache kept")
        axis.set(xscale="log", yscale="log", xlabel="queries to one context", ylabel="seconds, writing included")
        axis.set_title(f"{most} pairs; queries answered {full.queries} at once")
        axis.legend(frameon=False, fontsize=7)
    return path


def comparison_by_minutes(entries: Sequence[Entry], path: Path) -> Path:
    """Draw the pairs recalled per training context by minutes of training, for systems whose runs are available."""
    with figure(path) as axis:
        for name, mine in _by_system(entries):
            if mine[0].training.curve:
                axis.plot(*zip(*mine[0].training.curve, strict=True), label=name)
        if axis.lines:
            axis.legend(frameon=False, fontsize=7)
        axis.set_yscale("symlog", base=2, linthresh=1)
        ticks = [0, 1, *(pairs for pairs in sorted(set(_pairs(entries))) if pairs > 1)]
        axis.set_yticks(ticks, [str(tick) for tick in ticks])
        axis.set(xlabel="minutes of training", ylabel="pairs recalled of a training context")
    return path


def _by_system(entries: Sequence[Entry]) -> Iterator[tuple[str, list[Entry]]]:
    for name in dict.fromkeys(entry.result.checkpoint for entry in entries):
        yield name, [entry for entry in entries if entry.result.checkpoint == name]


def _pairs(entries: Sequence[Entry]) -> list[int]:
    return [entry.result.task["pairs"] for entry in entries]


def _match(entries: Sequence[Entry]) -> list[float]:
    return [100 * entry.result.exact_match for entry in entries]


def _about(entries: Sequence[Entry]) -> str:
    return f"{entries[0].result.samples} contexts, seed {entries[0].result.seed}"
