"""How many contexts are missing? Exact match against the contexts of training, and a line through the last points.

A file of measured points is drawn with a logarithmic axis of contexts, beside the paper's values. Of each curve the
log-odds of the last points are fitted by a line in log(contexts), which says where it would reach the target. That is
an extrapolation: it holds only as long as training goes on as it did.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np

from benchmarks.common import Row, parser, report
from gradmem.evaluation.figures import figure

Curve = list[dict[str, str]]


def read_curves(file: Path) -> dict[str, Curve]:
    """Points of each curve: columns curve, contexts, exact_match, low, high, target and paper (or nothing), in %."""
    curves: dict[str, Curve] = {}
    with file.open(newline="") as lines:
        for row in csv.DictReader(lines):
            curves.setdefault(row["curve"], []).append(row)
    return curves


def log_odds(percent: float) -> float:
    """Log-odds of a share in percent."""
    return math.log(percent / (100 - percent))


def fitted(curve: Curve, last: int) -> tuple[float, float]:
    """Slope and offset of the log-odds of the last points in log(contexts)."""
    points = curve[-last:]
    contexts = np.log([float(point["contexts"]) for point in points])
    slope, offset = np.polyfit(contexts, [log_odds(float(point["exact_match"])) for point in points], 1)
    return float(slope), float(offset)


def contexts_at(percent: float, slope: float, offset: float) -> float:
    """Contexts after which the line has this exact match."""
    return math.exp((log_odds(percent) - offset) / slope) if slope > 0 else math.inf


def extrapolated(name: str, curve: Curve, last: int) -> Row:
    """What the line of a curve says of its target and of the paper's value."""
    slope, offset = fitted(curve, last)
    seen = float(curve[-1]["contexts"])
    row: Row = {"curve": name, "contexts": int(seen), "EM %": float(curve[-1]["exact_match"])}
    for what in ("target", "paper"):
        if curve[-1][what]:
            goal = float(curve[-1][what])
            row |= {f"{what} %": goal, f"times for {what}": round(contexts_at(goal, slope, offset) / seen, 1)}
    return row


def draw(curves: dict[str, Curve], last: int, path: Path) -> None:
    """Points with intervals, the fitted lines, and the paper's values."""
    with figure(path) as axis:
        for number, (name, curve) in enumerate(curves.items()):
            contexts = np.array([float(point["contexts"]) for point in curve])
            found, low, high = (
                np.array([float(point[key]) for point in curve]) for key in ("exact_match", "low", "high")
            )
            paper, color = curve[-1]["paper"], f"C{number}"
            axis.errorbar(contexts, found, [found - low, high - found], fmt="o", color=color, label=name, markersize=4)
            slope, offset = fitted(curve, last)
            reach = min(contexts_at(float(curve[-1]["target"]), slope, offset), 100 * contexts[-1])
            along = np.geomspace(contexts[-last:][0], reach, 50)
            axis.plot(along, 100 / (1 + np.exp(-slope * np.log(along) - offset)), "--", color=color, linewidth=1)
            if paper:
                axis.axhline(float(paper), color=color, linewidth=0.8, linestyle=":")
        axis.set(xscale="log", xlabel="contexts of training", ylabel="exact match, %", ylim=(0, 100))
        title = "dashed: extrapolated to the target; dotted: the paper"
        axis.legend(fontsize=8, title=title, title_fontsize=8, loc="lower right", ncols=2)


def main() -> None:
    """Command line."""
    command = parser(__doc__, repeats=None)
    command.add_argument("points", type=Path, help="CSV of measured points, in the order of their contexts")
    command.add_argument("--last", type=int, default=3, metavar="N", help="points that a line is fitted to")
    command.add_argument("--figure", type=Path, default=None, metavar="FILE", help="draw it here")
    options = command.parse_args()
    curves = read_curves(options.points)
    rows = [extrapolated(name, curve, options.last) for name, curve in curves.items()]
    report(f"A line through the last {options.last} points", rows, {"points": str(options.points)}, options.json)
    if options.figure:
        draw(curves, options.last, options.figure)


if __name__ == "__main__":
    main()
