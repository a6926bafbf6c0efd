"""Published exact match (arXiv 2603.13875), to compare with.

The values were read from the plots of the paper, to within about 0.3 points.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

BY_PAIRS: dict[str, dict[int, float]] = {
    "Transformer, whole KV-cache": {4: 100, 8: 100, 16: 100, 32: 99.8, 64: 96.6, 96: 98.8},
    "RMT, 1 pass": {4: 100, 8: 100, 16: 45.5, 32: 44.3, 64: 19.3, 96: 12.9},
    "GradMem, 1 step": {4: 100, 8: 99.7, 16: 96.3, 32: 86.9, 64: 58.6, 96: 32.6},
    "GradMem, 5 steps": {4: 100, 8: 100, 16: 100, 32: 99.9, 64: 99.1, 96: 88.4},
}
"""Key-value retrieval with 8 vectors: percent by number of pairs."""

BY_STEPS: dict[tuple[int, int], list[float]] = {
    (32, 1): [86.9, 92.3, 96.7, 97.7, 98.1],
    (32, 2): [65.1, 98.2, 99.2, 99.7, 99.6],
    (64, 2): [31.8, 72.8, 81.5, 89.9, 89.9],
    (96, 5): [8.6, 22.3, 39.8, 62.0, 88.4],
}
"""(pairs, write steps in training) -> percent after 1 to 5 steps."""

BEST_OF_30: dict[tuple[int, int], float] = {(32, 1): 98.3, (32, 2): 99.8, (64, 2): 93.9, (96, 5): 95.8}
"""(pairs, write steps in training) -> percent after the best number of up to 30 steps."""


def by_pairs(axis: Any, pairs: Iterable[int], title: str) -> None:
    """Prepare axes for exact match by pairs, with the published curves dashed (figure 1 of the paper)."""
    for name, curve in BY_PAIRS.items():
        axis.plot(list(curve), list(curve.values()), "--", marker=".", alpha=0.5, label=f"paper: {name}")
    axis.set_xscale("log", base=2)
    ticks = sorted({*pairs, 4, 8, 16, 32, 64, 96})
    axis.set_xticks(ticks, labels=[str(tick) for tick in ticks], minor=False)
    axis.set(xlabel="key-value pairs", ylabel="exact match, %", ylim=(-3, 103), title=title)
