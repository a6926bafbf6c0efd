"""Results as tables, JSON and figures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table

from ..errors import GradmemError
from ..memory import write_bytes
from .evaluate import Result


def table(results: Sequence[Result]) -> Table:
    """Table of results; every group of rows ends with its control rows."""
    options = [key for key in results[0].task if key != "name"]
    first = results[0]
    built = Table(
        title=f"{first.checkpoint}: exact match, {first.samples} {first.split} contexts, seed {first.seed}",
        caption=f"memory: {first.size}; {first.parameters:,} parameters; "
        "all queries of each context; 95 % interval bootstrapped over contexts",
    )
    for option in options:
        built.add_column(option, justify="right")
    for heading in ("memory", "steps", "EM %", "95 %", "write loss"):
        built.add_column(heading, justify="left" if heading == "memory" else "right")
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        groups.setdefault(tuple(result.task[option] for option in options), []).append(result)
    for key, group in groups.items():
        cells = [str(value) for value in key]
        for result in group:
            low, high = (f"{100 * bound:.2f}" for bound in result.ci95)
            built.add_row(
                *cells,
                "written" if result.steps else "unwritten",
                str(result.steps),
                f"{100 * result.exact_match:.2f}",
                f"{low} to {high}",
                f"{result.write_loss:.4f}",
            )
        last = group[-1]
        built.add_row(*cells, "control: unwritten", "0", f"{100 * last.unwritten:.2f}", "", "", style="dim")
        built.add_row(
            *cells,
            "control: swapped",
            str(last.swapped_steps),
            f"{100 * last.swapped:.2f}",
            "",
            "",
            style="dim",
            end_section=True,
        )
    return built


def save_json(results: Sequence[Result], path: str | Path) -> Path:
    """Save results as a JSON list of rows."""
    return write_bytes(Path(path), json.dumps([result.row() for result in results], indent=1).encode())


@contextmanager
def figure(path: str | Path, rows: int = 1, height: float = 4.2) -> Iterator[Any]:
    """Axes to draw on (several where there are rows); saved at the end.

    Raises
    ------
    GradmemError
        When matplotlib is missing or the file cannot be written.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise GradmemError("figures need matplotlib: pip install 'gradmem[figures]'") from error
    mpl.use("agg")
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(rows, figsize=(7, height * rows), layout="constrained")
    try:
        yield axes
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
