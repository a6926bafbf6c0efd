"""Time and memory of one meta-training step: ours against the naive unroll.

A step is K write steps, the read and the backward pass through all of it, without the optimiser. Every
variant runs in a process of its own; its memory is the peak resident set less that just before the first step.
"""

from __future__ import annotations

import argparse
import re
import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import naive
from common import (
    Precision,
    Row,
    autocast,
    forget_peak,
    in_fresh_process,
    machine,
    measure,
    paper_model,
    parser,
    peak,
    plain_model,
    report,
    seconds,
)
from gradmem.batch import Batch
from gradmem.methods import GradMem
from gradmem.model import MemoryModel
from gradmem.training.step import MetaStep

WRITE_LOSS_WEIGHT = 0.5
"""Weight of the last write loss in the outer loss, as published."""
OFFICIAL_SECONDS = {"N8-K1-B64": 0.74, "N32-K1-B64": 3.6}
"""One step of the official code with two threads on this kind of machine: a slower naive is no baseline."""
TOLERANCE = 1e-3
"""Largest relative difference between naive and ours in loss, and in the gradient of the initial memory."""


@dataclass(frozen=True)
class Setting:
    """N pairs, K write steps, B contexts in a batch."""

    pairs: int
    steps: int
    batch: int

    @classmethod
    def parse(cls, text: str) -> Setting:
        """Read `N32-K5-B64`."""
        match = re.fullmatch(r"N(\d+)-K(\d+)-B(\d+)", text)
        if match is None:
            raise argparse.ArgumentTypeError(f"{text!r} is no setting: write it as N32-K5-B64")
        return cls(*map(int, match.groups()))

    def __str__(self) -> str:
        return f"N{self.pairs}-K{self.steps}-B{self.batch}"


@dataclass(frozen=True)
class Variant:
    """One way to do the step; `queries` for each context, None for all."""

    name: str
    naive: bool = False
    precision: Precision = "fp32"
    queries: int | None = 1


NAIVE, OURS = Variant("naive", naive=True), Variant("ours fp32")
VARIANTS = [NAIVE, OURS, Variant("ours bf16", precision="bf16"), Variant("ours all-queries", queries=None)]
DEFAULTS = [Setting(8, 1, 64), Setting(32, 1, 64), Setting(32, 5, 16)]


@dataclass
class Run:
    """What a process measured; the loss and gradient are those of the last step."""

    seconds: float
    peak_mb: float
    loss: float
    gradient: list[float]


Runs = dict[tuple[str, str], Run]
"""Runs by setting and variant."""


class OurStep:
    """The step of the trainer."""

    def __init__(self, model: MemoryModel, batch: Batch, steps: int, precision: Precision) -> None:
        self.step, self.batch, self.steps, self.precision = MetaStep(model.method), batch, steps, precision
        self.scored = model.task.scored(batch.labels)
        self.tokens = int((batch.labels != -100).sum())

    def __call__(self) -> Tensor:
        """Return the outer loss."""
        with autocast(self.precision):
            loss, write_loss, _ = self.step(self.batch, self.steps, self.scored)
        return loss / self.tokens + WRITE_LOSS_WEIGHT * write_loss


class NaiveStep:
    """The step of `naive.py`."""

    def __init__(self, model: MemoryModel, batch: Batch, steps: int) -> None:
        self.model, self.batch, self.steps = model, batch, steps
        self.plain = plain_model(model.method, "eager")

    def __call__(self) -> Tensor:
        """Return the outer loss."""
        method, batch = self.model.method, self.batch
        assert isinstance(method, GradMem)
        assert method.write_head is not None
        self.plain.zero_grad()
        loss, write_loss = naive.meta_loss(
            self.plain,
            method.write_head,
            method.initial_memory,
            method.inner_lr,
            self.steps,
            batch.context.ids,
            batch.queries.ids,
            batch.labels,
        )
        return loss + WRITE_LOSS_WEIGHT * write_loss


def run(setting: Setting, variant: Variant, repeats: int, threads: int) -> Run:
    """Measure one variant; to be called in a fresh process."""
    torch.set_num_threads(threads)
    model = paper_model(setting.pairs, variant.queries)
    batch = model.task.batch("train", 0, setting.batch)
    step = (
        NaiveStep(model, batch, setting.steps)
        if variant.naive
        else OurStep(model, batch, setting.steps, variant.precision)
    )
    losses = []

    def once() -> None:
        model.method.zero_grad()
        loss = step()
        loss.backward()
        losses.append(loss.item())

    before = forget_peak()
    took = seconds(once, repeats)
    used = peak() - before
    gradient = model.method.get_parameter("initial_memory").grad
    assert gradient is not None
    return Run(took, used, losses[-1], gradient.flatten().tolist())


def disagreement(one: Run, other: Run) -> float:
    """Relative difference of the losses, or of the gradients of the initial memory where that is larger."""
    gradients = torch.tensor([one.gradient, other.gradient])
    gradient = float((gradients[0] - gradients[1]).norm() / gradients[0].norm())
    return max(abs(one.loss - other.loss) / abs(one.loss), gradient)


def job(setting: Setting, variant: Variant, repeats: int, threads: int, runs: Runs) -> Row:
    """Measure one variant in a fresh process, keep its run, and make its row."""
    row: Row = {"setting": str(setting), "variant": variant.name}
    try:
        done = in_fresh_process(run, setting, variant, repeats, threads)
    except BrokenProcessPool:
        return {**row, "error": "process was killed: out of memory?"}
    runs[str(setting), variant.name] = done
    row |= {"seconds_median": done.seconds, "peak_mb": done.peak_mb, "loss": done.loss}
    base = runs.get((str(setting), NAIVE.name))
    if base is not None:
        row |= {"memory_ratio": done.peak_mb / base.peak_mb, "time_ratio": done.seconds / base.seconds}
    if variant is NAIVE and str(setting) in OFFICIAL_SECONDS:
        row["official_seconds"] = OFFICIAL_SECONDS[str(setting)]
    return row


def check(runs: Runs) -> list[str]:
    """Say how far naive and ours agree, and return what is wrong."""
    problems = []
    for setting in dict.fromkeys(setting for setting, _ in runs):
        if (setting, OURS.name) not in runs:
            problems.append(f"{setting}: ours fp32 did not run")
            continue
        if (setting, NAIVE.name) not in runs:
            print(f"{setting}: naive did not run, so nothing is compared")
            continue
        apart = disagreement(runs[setting, NAIVE.name], runs[setting, OURS.name])
        print(f"{setting}: loss and meta-gradient of naive and ours fp32 agree to {apart:.1e}")
        if not apart < TOLERANCE:
            problems.append(f"{setting}: naive and ours compute different things ({apart:.1e} apart)")
    return problems


def too_slow(rows: list[Row]) -> list[str]:
    """Settings where naive took longer than the official code, so that its time is no baseline."""
    timed = [row for row in rows if "official_seconds" in row and "seconds_median" in row]
    return [row["setting"] for row in timed if row["seconds_median"] > row["official_seconds"]]


def main() -> None:
    """Command line."""
    command = parser(__doc__)
    command.add_argument(
        "--setting",
        type=Setting.parse,
        action="append",
        metavar="N32-K5-B64",
        default=argparse.SUPPRESS,
        help=f"pairs, write steps and batch; may be repeated (default: {' '.join(map(str, DEFAULTS))})",
    )
    options = command.parse_args()
    settings = getattr(options, "setting", DEFAULTS)
    where = machine(options.threads, "fp32 unless the variant says otherwise")
    runs: Runs = {}
    rows = measure(
        "meta-training steps",
        [
            partial(job, setting, variant, options.repeats, options.threads, runs)
            for setting in settings
            for variant in VARIANTS
        ],
    )
    report("One meta-training step (ratios: to naive; official: two threads)", rows, where, options.json)
    problems = check(runs)
    if options.threads >= 2:
        for setting in too_slow(rows):
            print(f"{setting}: naive is slower here than the official code, so its time is no baseline")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
