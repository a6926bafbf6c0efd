"""The tables of eval, sweep, compare and calibrate."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence

from rich.table import Table

from ..evaluation.calibrate import RIGHT, Calibration
from ..evaluation.result import Result
from ..experiments.compare import Entry
from ..experiments.sweep import FEW, Point


def results_table(results: Sequence[Result]) -> Table:
    """Table of results; each group of rows ends with its control rows. If there is one task, the title names it."""
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
                "written" if result.steps else "start" if result.from_context else "unwritten",
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


def sweep_table(points: Sequence[Point]) -> Table:
    """Exact match after one step and after the chosen numbers of steps, with controls."""
    first = next(iter(points[0].results.values()))
    built = Table(
        title=f"{chosen_options(first)}exact match %, {first.samples} test contexts, all queries, seed {first.seed}",
        caption="95 % intervals bootstrapped over contexts; numbers of steps chosen on validation contexts; swapped: "
        "memories of other contexts, after the best number of steps",
    )
    for heading in ("checkpoint", "pairs", "1 step", f"best of <= {FEW}", "best of all", "unwritten", "swapped"):
        left = heading == "checkpoint"
        built.add_column(heading, justify="left" if left else "right", min_width=8 if left else None, overflow="fold")
    for point in points:
        any_result = point.results[point.best]
        one = point.results.get(1)
        built.add_row(
            point.checkpoint,
            str(point.pairs),
            _shown(one) if one else "",
            _shown(point.results[point.few]),
            _shown(any_result),
            f"{100 * any_result.unwritten:.2f}",
            f"{100 * any_result.swapped:.2f}",
        )
    return built


def _shown(result: Result) -> str:
    return f"{100 * result.exact_match:.2f} (K={result.steps})\n{percent_interval(result.ci95)}"


def match_table(entries: Sequence[Entry]) -> Table:
    """Exact match and bytes of each system, with controls."""
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
    """Cost of writing and asking, and the amount of training of each system."""
    built = _table(
        "cost of a context and of a query, all queries of a context asked at once",
        "< again, < cache: number of queries from which writing once takes less time than reading the context again "
        "for each query, or than reading it once and keeping its KV-cache",
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
        # Headings and intervals may wrap; names and numbers must not.
        built.add_column(heading, justify="left" if left else "right", no_wrap=left)
    return built


def _with_ends(entries: Sequence[Entry]) -> Iterator[tuple[Entry, bool]]:
    """Entries, and whether each is the last of its system."""
    for entry, after in zip(entries, [*entries[1:], None], strict=True):
        yield entry, after is None or after.result.checkpoint != entry.result.checkpoint


def _queries(count: float) -> str:
    return "never" if math.isinf(count) else f"{count:,.0f}"


def calibration_table(found: Calibration) -> Table:
    """How well abstaining works, one row for each kind of query."""
    built = Table(
        title=f"{found.checkpoint}, {found.label}: abstaining, {found.samples} test contexts, seed {found.seed}",
        caption=f"accuracy {found.accuracy:.2%} at P(written) = {found.abstain.threshold}, calibration error (ECE) "
        f"{found.ece:.2%}, where answers that were written count one half; right: {found.exact_match:.2%} of the "
        f"answers to written queries, {found.right_answered:.2%} of those that were given; on the right: area under "
        "the ROC curve, %, against answers that were written, by the fitted probability and by each number alone",
        pad_edge=False,
        collapse_padding=True,
    )
    areas = {kind: found.auroc(kind) for kind in found.answers if kind != RIGHT}
    names = next(iter(areas.values()), {})
    for heading in ("queries", "count", "abstained %", *(name.replace("_", "\n") for name in names)):
        built.add_column(heading, justify="left" if heading == "queries" else "right", no_wrap=heading == "queries")
    for kind, answers in found.answers.items():
        shown = [f"{100 * area:.2f}" for area in areas.get(kind, {}).values()]
        built.add_row(kind, str(len(answers)), f"{100 * found.abstained(kind):.2f}", *shown)
    return built


def chosen_options(result: Result) -> str:
    """Options of the method that differ from the checkpoint's, for titles."""
    return "".join(f"{name} {value}, " for name, value in result.method.items())


def percent_interval(bounds: tuple[float, float], digits: int = 2) -> str:
    """Format a 95 % interval in percent."""
    return " to ".join(f"{100 * bound:.{digits}f}" for bound in bounds)
