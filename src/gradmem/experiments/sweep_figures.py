"""Figures of a sweep: exact match by pairs and by steps, beside the published numbers, and the bits recalled."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..evaluation.figures import figure
from ..evaluation.result import Result
from .published import BEST_OF_30, BY_STEPS, by_pairs
from .sweep import FEW, Point


def sweep_by_pairs(points: Sequence[Point], path: Path) -> Path:
    """Draw exact match by pairs: these checkpoints solid, the published ones dashed (figure 1 of the paper)."""
    with figure(path) as axis:
        by_pairs(axis, [point.pairs for point in points], _about(points))
        for label, mine in _curves(points):
            values = [100 * result.exact_match for _, result in mine]
            axis.plot([point.pairs for point, _ in mine], values, marker="o", label=label)
        axis.legend(frameon=False, fontsize=7)
    return path


def _curves(points: Sequence[Point]) -> Iterator[tuple[str, list[tuple[Point, Result]]]]:
    """Curves of each checkpoint by pairs: after one step if measured, and after the chosen numbers of steps."""
    for checkpoint in dict.fromkeys(point.checkpoint for point in points):
        mine = sorted((p for p in points if p.checkpoint == checkpoint), key=lambda p: p.pairs)
        kinds = {"1 step": lambda p: 1, f"<= {FEW} steps": lambda p: p.few, "best": lambda p: p.best}
        for kind, chosen in kinds.items():
            known = [(p, p.results[chosen(p)]) for p in mine if chosen(p) in p.results]
            if known:
                yield f"{checkpoint}: {kind}", known


def sweep_bits(points: Sequence[Point], path: Path) -> Path:
    """Draw the bits of the recalled pairs by number of pairs, beside the bits of the context and of the memory."""
    with figure(path) as axis:
        for label, mine in _curves(points):
            stored = [point.bits * result.exact_match for point, result in mine]
            axis.plot([point.pairs for point, _ in mine], stored, marker="o", label=label)
        said = sorted({(point.pairs, point.bits) for point in points})
        axis.plot(*zip(*said, strict=True), "k--", label="all pairs of the context")
        state = 8 * next(iter(points[0].results.values())).bytes
        axis.axhline(state, color="k", linestyle=":", label=f"the memory: {state:,} bits")
        axis.set(xscale="log", yscale="log", xlabel="key-value pairs", ylabel="bits of recalled keys and values")
        axis.set_xticks([p for p, _ in said], labels=[str(p) for p, _ in said])
        axis.tick_params(axis="x", which="minor", labelbottom=False)
        axis.set_title(_about(points), fontsize=9)
        axis.legend(frameon=False, fontsize=7)
    return path


def sweep_heatmap(points: Sequence[Point], path: Path) -> Path:
    """Draw a heat map for each number of pairs: checkpoints by write steps, with the published rows."""
    pairs = list(dict.fromkeys(point.pairs for point in points))
    steps = [step for step in points[0].results if step]
    maps = [_map([point for point in points if point.pairs == count], count, steps) for count in pairs]
    sizes = [2 + len(rows) for rows in maps]
    options = {"squeeze": False, "gridspec_kw": {"height_ratios": sizes}}
    with figure(path, len(pairs), height=0.35 * sum(sizes) / len(sizes) + 0.3, **options) as axes:
        for (axis,), count, rows in zip(axes, pairs, maps, strict=True):
            image = axis.imshow(list(rows.values()), vmin=0, vmax=100, aspect="auto", cmap="viridis")
            axis.set_yticks(range(len(rows)), labels=list(rows), fontsize=7)
            labels = [str(s) if s in (1, 2, 3, 5) or not s % 5 else "" for s in steps]
            axis.set_xticks(range(len(steps)), labels=labels, fontsize=7)
            axis.set_title(f"{count} pairs", fontsize=9)
            for y, values in enumerate(rows.values()):
                top, x = max((value, -x) for x, value in enumerate(values) if not math.isnan(value))
                axis.text(-x, y, f"{top:.1f}", ha="center", va="center", fontsize=7)
        axis.set_xlabel("write steps")
        axis.figure.suptitle(f"exact match, %, by write steps; {_about(points)}", fontsize=9)
        axis.figure.colorbar(image, ax=axes[:, 0], shrink=0.5)
    return path


def _map(points: Sequence[Point], pairs: int, steps: Sequence[int]) -> dict[str, list[float]]:
    """Rows of a heat map in percent by step, with the published ones; NaN where there is no value."""
    rows = {f"{p.checkpoint} (K={p.trained_steps})": [100 * p.results[s].exact_match for s in steps] for p in points}
    for (of_pairs, trained), values in BY_STEPS.items():
        if of_pairs == pairs:
            known = dict(enumerate(values, 1))
            name = f"paper (K={trained}; best of 30: {BEST_OF_30[pairs, trained]})"
            rows[name] = [known.get(step, math.nan) for step in steps]
    return rows


def _about(points: Sequence[Point]) -> str:
    first = next(iter(points[0].results.values()))
    return f"{first.size}, {first.samples} contexts, seed {first.seed}"
