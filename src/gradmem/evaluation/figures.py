"""Figures, and exact match by write step as one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import GradmemError
from .result import Result


@contextmanager
def figure(path: str | Path, rows: int = 1, height: float = 4.2, **options: Any) -> Iterator[Any]:
    """Open a figure, give its axes, and save it at the end.

    Parameters
    ----------
    path : path
        File to save, in the format of its suffix.
    rows : int
        Rows of axes.
    height : float
        Height of a row, in inches.
    **options
        Other options of matplotlib's `subplots`.

    Yields
    ------
    matplotlib axes
        One, or an array of them if there are several.

    Raises
    ------
    GradmemError
        If matplotlib is missing or the file cannot be written.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise GradmemError("figures need matplotlib: pip install 'gradmem[figures]'") from error
    mpl.use("agg")
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(rows, figsize=(7, height * rows), layout="constrained", **options)
    try:
        yield axes
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(path, dpi=150)
    except (OSError, ValueError) as failure:
        raise GradmemError(f"cannot write the figure {path}: {failure}") from failure
    finally:
        pyplot.close(drawn)


def steps_figure(results: Sequence[Result], path: str | Path, title: str) -> Path:
    """Draw exact match and write loss by write step."""
    steps = [result.steps for result in results]
    match = [100 * result.exact_match for result in results]
    bars = [
        [100 * (result.exact_match - result.ci95[0]) for result in results],
        [100 * (result.ci95[1] - result.exact_match) for result in results],
    ]
    with figure(path) as axis:
        axis.errorbar(steps, match, yerr=bars, marker="o", color="C0", capsize=3, label="exact match")
        axis.plot(
            results[-1].swapped_steps, 100 * results[-1].swapped, "x", color="C0", label="memories swapped (control)"
        )
        axis.set(xlabel="write steps", ylabel="exact match, %", ylim=(-3, 103), title=title)
        axis.set_xticks(steps)
        other = axis.twinx()
        other.plot(steps, [result.write_loss for result in results], marker="s", color="C1", label="write loss")
        other.set_ylabel("write loss, nats per token")
        other.set_ylim(bottom=0)
        lines = [*axis.get_legend_handles_labels()[0], *other.get_legend_handles_labels()[0]]
        axis.legend(lines, [str(line.get_label()) for line in lines], loc="center right", frameon=False)
    return Path(path)
