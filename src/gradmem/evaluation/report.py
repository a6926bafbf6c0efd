"""Results as tables, JSON and figures."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table

from ..errors import GradmemError
from ..experiments.published import BY_PAIRS
from ..files import write_bytes
from .measurement import Result


def table(results: Sequence[Result]) -> Table:
    """Table of results; every group of rows ends with its control rows. A task that is alone stands in the title."""
    first = results[0]
    labels = list(dict.fromkeys(result.label for result in results))
    alone = f"{labels[0]}, " if len(labels) == 1 else ""
    contexts = "/".join(dict.fromkeys(str(result.samples) for result in results))
    sources = ", ".join(dict.fromkeys(result.source for result in results))
    others = [name for name in first.metrics if not name.startswith(("unwritten_", "swapped_"))]
    built = Table(
        title=f"{first.checkpoint}: {alone}{chosen_options(first)}exact match, "
        f"{contexts} {first.split} contexts ({sources}), seed {first.seed}",
        caption=f"memory: {first.size}; {first.parameters:,} parameters; "
        "all queries of each context; 95 % interval bootstrapped over contexts",
        pad_edge=False,
    )
    for heading in (*([] if alone else ["task"]), "memory", "steps", "EM %", "95 %", *others, "write loss"):
        left = heading in ("task", "memory")
        built.add_column(heading.replace("_", " "), justify="left" if left else "right", no_wrap=heading == "memory")
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(json.dumps(result.task, sort_keys=True), []).append(result)
    for group in groups.values():
        label = [] if alone else [group[0].label]
        for result in group:
            built.add_row(
                *label,
                "written" if result.steps else "unwritten",
                str(result.steps),
                f"{100 * result.exact_match:.2f}",
                percent_interval(result.ci95),
                *(f"{result.metrics[name]:.4g}" for name in others),
                f"{result.write_loss:.4f}",
            )
        last = group[-1]
        for kind, steps, match in (
            ("unwritten", 0, last.unwritten),
            ("swapped", last.swapped_steps, last.swapped),
        ):
            rest = [f"{last.metrics[f'{kind}_{name}']:.4g}" for name in others]
            row = [
                *label,
                f"control: {kind}",
                str(steps),
                f"{100 * match:.2f}",
                percent_interval(last.intervals[kind]),
                *rest,
                "",
            ]
            built.add_row(*row, style="dim", end_section=kind == "swapped")
        if last.bits_per_vector is not None:
            built.caption = f"{built.caption}; {last.bits_per_vector:.1f} bits per vector after {last.steps} steps"
    return built


def chosen_options(result: Result) -> str:
    """What was chosen anew for a checkpoint's method, as titles show it."""
    return "".join(f"{name} {value}, " for name, value in result.method.items())


def percent_interval(bounds: tuple[float, float]) -> str:
    """A 95 % interval as tables show it."""
    return " to ".join(f"{100 * bound:.2f}" for bound in bounds)


def save_json(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Save rows as a JSON list."""
    return write_bytes(path, json.dumps(rows, indent=1).encode())


def save_csv(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Save rows as a table; a column that a row lacks stays empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return write_bytes(path, text.getvalue().encode())


@contextmanager
def figure(path: str | Path, rows: int = 1, height: float = 4.2, **options: Any) -> Iterator[Any]:
    """Axes to draw on (several where there are rows, or columns among the options of `subplots`); saved at the end.

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

    drawn, axes = pyplot.subplots(rows, figsize=(7, height * rows), layout="constrained", **options)
    try:
        yield axes
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(path, dpi=150)
    except (OSError, ValueError) as failure:
        raise GradmemError(f"cannot write the figure {path}: {failure}") from failure
    finally:
        pyplot.close(drawn)


def by_pairs(axis: Any, pairs: Iterable[int], title: str) -> None:
    """Prepare axes for exact match by pairs, the paper's curves dashed (its figure 1)."""
    for name, curve in BY_PAIRS.items():
        axis.plot(list(curve), list(curve.values()), "--", marker=".", alpha=0.5, label=f"paper: {name}")
    axis.set_xscale("log", base=2)
    ticks = sorted({*pairs, 4, 8, 16, 32, 64, 96})
    axis.set_xticks(ticks, labels=[str(tick) for tick in ticks], minor=False)
    axis.set(xlabel="key-value pairs", ylabel="exact match, %", ylim=(-3, 103), title=title)


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
