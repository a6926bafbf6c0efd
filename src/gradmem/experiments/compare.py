"""Several systems on the same contexts: who stores how much, in how many bytes, at what cost."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from ..errors import GradmemError
from ..evaluation.measurement import Result, evaluate
from ..evaluation.report import by_pairs, figure, percent_interval
from ..methods.base import Method
from ..methods.full_context import FullContext
from ..model import MemoryModel
from ..model.build import build_task
from ..training.recipe import Recipe, load_recipe
from .cost import Cost, break_even, measure

ASKED = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
"""Numbers of queries in the cost figure."""


CURVE_POINTS = 200
"""Most points of a training curve."""


@dataclass(frozen=True)
class Training:
    """How much a system was trained; nothing is known where the run is not at hand.

    Attributes
    ----------
    samples : int, optional
        Contexts seen.
    seconds : float, optional
    curve : tuple of (float, float)
        Minutes, and pairs of a training context that were answered then, on the average.
    """

    samples: int | None = None
    seconds: float | None = None
    curve: tuple[tuple[float, float], ...] = ()

    @classmethod
    def of(cls, run: Path) -> Training:
        """Read it off the log and the recipe of a run."""
        log = run / "log.csv"
        if not log.exists():
            return cls()
        with log.open(newline="") as file:
            rows = list(csv.DictReader(file))
        if not rows:
            return cls()
        asked = _pairs_of_stages(load_recipe(str(run / "recipe.yaml")))
        recalled = [float(row["exact_match"]) * asked[int(row["stage"])] for row in rows]
        size = math.ceil(len(rows) / CURVE_POINTS)
        curve = tuple(
            (float(rows[start]["seconds"]) / 60, fmean(recalled[start : start + size]))
            for start in range(0, len(rows), size)
        )
        return cls(int(rows[-1]["samples"]), float(rows[-1]["seconds"]), curve)


def _pairs_of_stages(recipe: Recipe) -> list[float]:
    """Pairs in a context of each stage, on the average."""
    own = recipe.task.get("pairs", 0)
    return [fmean(options.get("pairs", own) for options in stage.tasks) for stage in recipe.stages]


@dataclass(frozen=True)
class Entry:
    """One system at one number of pairs.

    Attributes
    ----------
    result : Result
        Exact match with its control rows.
    cost : Cost
        Of the system.
    reference : Cost
        Of the full context with the same kind of backbone: a write is one pass over the context.
    training : Training
    """

    result: Result
    cost: Cost
    reference: Cost
    training: Training

    @property
    def beats_rereading(self) -> float:
        """Queries from which on writing once is cheaper than reading the context again for each."""
        again = self.reference.write_seconds + self.reference.query_seconds
        return break_even(self.cost.write_seconds, self.cost.query_seconds, 0.0, again)

    @property
    def beats_kept_cache(self) -> float:
        """Queries from which on writing once is cheaper than running the context once and keeping its KV-cache."""
        reference = self.reference
        return break_even(
            self.cost.write_seconds, self.cost.query_seconds, reference.write_seconds, reference.query_seconds
        )

    def to_dict(self) -> dict[str, Any]:
        """All numbers as one flat row; a number of queries that is never reached is None."""
        never = {math.inf: None}
        return {
            **self.result.to_dict(),
            **asdict(self.cost),
            **{f"full_context_{key}": value for key, value in asdict(self.reference).items()},
            "cheaper_than_rereading_from": never.get(self.beats_rereading, self.beats_rereading),
            "cheaper_than_kept_cache_from": never.get(self.beats_kept_cache, self.beats_kept_cache),
            "trained_samples": self.training.samples,
            "trained_seconds": self.training.seconds,
        }


def compare(
    systems: Sequence[tuple[MemoryModel, Training]],
    pairs: Sequence[int],
    samples: int = 500,
    seed: int = 1,
    repeats: int = 5,
    progress: Callable[[Iterable[Any], str], Iterable[Any]] = lambda batches, title: batches,
) -> list[Entry]:
    """Measure systems on the same contexts, each with the write steps that it was trained with.

    Parameters
    ----------
    systems : sequence of (MemoryModel, Training)
    pairs : sequence of int
    samples, seed
        Fresh contexts, of which all queries are asked.
    repeats : int
        Timed runs for the cost.

    Raises
    ------
    GradmemError
        When no system has a backbone whose KV-cache could be kept.
    """
    reference = _reference(model.method for model, _ in systems)
    costs: dict[int, Cost] = {}
    entries = []
    for model, training in systems:
        for count in pairs:
            task = build_task({**model.spec["task"], "pairs": count})
            if count not in costs:
                costs[count] = measure(reference, task, repeats)
            found = evaluate(model, None, samples, seed, task={"pairs": count}, progress=progress)
            entries.append(Entry(found[-1], measure(model.method, task, repeats), costs[count], training))
    return entries


def _reference(methods: Iterable[Method]) -> FullContext:
    """The full context on the first backbone that has a KV-cache."""
    for method in methods:
        try:
            return FullContext(method.backbone)
        except GradmemError:
            continue
    raise GradmemError("none of these systems has a KV-cache to compare with: add one on a transformer")


def match_table(entries: Sequence[Entry]) -> Table:
    """Exact match and bytes, each row with its controls."""
    first = entries[0].result
    built = _table(
        f"exact match, {first.samples} {first.split} contexts, all queries, seed {first.seed}",
        "95 % intervals bootstrapped over contexts; controls: unwritten, and swapped (memories of other contexts)",
        ["system", "pairs", "bytes", "steps", "EM %", "95 %", "unwritten", "swapped"],
    )
    for entry, last in _with_ends(entries):
        result = entry.result
        built.add_row(
            result.checkpoint,
            str(result.task["pairs"]),
            f"{entry.cost.bytes:,}",
            str(result.steps),
            f"{100 * result.exact_match:.2f}",
            percent_interval(result.ci95).replace("to ", "to\n"),
            f"{100 * result.unwritten:.2f}",
            f"{100 * result.swapped:.2f}",
            end_section=last,
        )
    return built


def cost_table(entries: Sequence[Entry]) -> Table:
    """What writing and asking cost, and how much each system was trained."""
    built = _table(
        "cost of a context and of a query, all queries of a context asked at once",
        "< again, < cache: number of queries to one context from which on writing once takes less time than reading "
        "the context again for each, or than running it once and keeping its KV-cache",
        ["system", "pairs", "write ms", "GFLOP", "query ms", "< again", "< cache", "trained on", "min"],
    )
    for entry, last in _with_ends(entries):
        cost, training = entry.cost, entry.training
        built.add_row(
            entry.result.checkpoint,
            str(entry.result.task["pairs"]),
            f"{1000 * cost.write_seconds:.1f}",
            f"{cost.write_flops / 1e9:.2f}",
            f"{1000 * cost.query_seconds:.2f}",
            _queries(entry.beats_rereading),
            _queries(entry.beats_kept_cache),
            f"{training.samples / 1000:,.1f}k" if training.samples else "",
            f"{training.seconds / 60:.0f}" if training.seconds else "",
            end_section=last,
        )
    return built


def _table(title: str, caption: str, headings: Sequence[str]) -> Table:
    built = Table(title=title, caption=caption, pad_edge=False, padding=0)
    for heading in headings:
        left = heading == "system"
        # Headings and intervals may take two lines, names and numbers must be read whole.
        built.add_column(heading, justify="left" if left else "right", no_wrap=left)
    return built


def _with_ends(entries: Sequence[Entry]) -> Iterator[tuple[Entry, bool]]:
    """Entries, and whether each is the last of its system."""
    for entry, after in zip(entries, [*entries[1:], None], strict=True):
        yield entry, after is None or after.result.checkpoint != entry.result.checkpoint


def _queries(count: float) -> str:
    return "never" if math.isinf(count) else f"{count:,.0f}"


def figures(entries: Sequence[Entry], directory: Path) -> list[Path]:
    """Draw exact match by pairs, by bytes and by the cost of a write, training, and the time of many queries."""
    return [
        pairs_figure(entries, directory / "pairs.png"),
        bytes_figure(entries, directory / "bytes.png"),
        flops_figure(entries, directory / "flops.png"),
        training_figure(entries, directory / "training.png"),
        cost_figure(entries, directory / "cost.png"),
    ]


def pairs_figure(entries: Sequence[Entry], path: Path) -> Path:
    """Exact match by pairs, ours solid and the paper's dashed (its figure 1)."""
    with figure(path) as axis:
        by_pairs(axis, _pairs(entries), _about(entries))
        for name, mine in _by_system(entries):
            axis.plot(_pairs(mine), _match(mine), marker="o", label=name)
        axis.legend(frameon=False, fontsize=7)
    return path


def bytes_figure(entries: Sequence[Entry], path: Path) -> Path:
    """Exact match by bytes of memory, each number of pairs beside the others: most memories are of equal size."""
    sizes = sorted(set(_pairs(entries)))
    columns = min(len(sizes), 3)
    rows = math.ceil(len(sizes) / columns)
    with figure(path, rows, 2.4, ncols=columns, sharex=True, sharey=True, squeeze=False) as axes:
        panels = axes.ravel()
        for axis, pairs in zip(panels, sizes, strict=False):
            for place, (name, mine) in enumerate(_by_system(entries)):
                shown = [entry for entry in mine if entry.result.task["pairs"] == pairs]
                # A marker each, the later smaller, so that what lies upon another shows.
                style = {"marker": "osD^v<>"[place % 7], "markersize": max(4, 10 - 2 * place), "linestyle": "none"}
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


def flops_figure(entries: Sequence[Entry], path: Path) -> Path:
    """Exact match by what a WRITE costs, passes over the context against gradient steps; points say their pairs."""
    with figure(path) as axis:
        for name, mine in _by_system(entries):
            places = [entry.cost.write_flops / 1e9 for entry in mine]
            axis.plot(places, _match(mine), marker="o", label=name)
            for pairs, place, match in zip(_pairs(mine), places, _match(mine), strict=True):
                axis.annotate(f" {pairs}", (place, match), fontsize=7)
        axis.set_xscale("log", base=2)
        axis.set(xlabel="GFLOP of a write", ylabel="exact match, %", ylim=(-3, 103))
        axis.set_title(f"by number of pairs (at the points); {_about(entries)}", fontsize=9)
        axis.legend(frameon=False, fontsize=7)
    return path


def cost_figure(entries: Sequence[Entry], path: Path) -> Path:
    """Seconds for writing a context of the most pairs once and asking it many times."""
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


def training_figure(entries: Sequence[Entry], path: Path) -> Path:
    """Pairs that a training context's queries recall, by minutes of training; as far as runs are at hand."""
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
