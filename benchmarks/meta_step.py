"""Time and memory of one meta-training step: ours against the naive unroll.

A step is K write steps, the read and the backward pass through all of it, without the optimiser. Every
variant runs in a process of its own; its memory is the peak resident set less that just before the first step.
"""

from __future__ import annotations

import argparse
import re
import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from benchmarks import naive
from benchmarks.common import (
    Precision,
    Row,
    in_fresh_process,
    machine,
    measure,
    paper_model,
    parser,
    plain_model,
    report,
)
from benchmarks.shapes import SMOLLM2
from gradmem.backbone import Backbone
from gradmem.batch import Batch, Tokens
from gradmem.experiments.cost import seconds
from gradmem.inner import Strategy
from gradmem.methods import GradMem
from gradmem.training.device_memory import forget_peak, free_memory, peak
from gradmem.training.step import MetaStep

WRITE_LOSS_WEIGHT = 0.5
"""Weight of the last write loss in the outer loss, as published."""
OFFICIAL_SECONDS = {"N8-K1-B64": 0.74, "N32-K1-B64": 3.6}
"""One step of the official code with two threads on this kind of machine: a slower naive is no baseline."""
TOLERANCE = 1e-3
"""Largest relative difference between naive and ours in loss, and in the gradient of the initial memory."""
CPU = torch.device("cpu")
QUERY = 12
"""Query and target tokens of a text."""


@dataclass(frozen=True)
class Setting:
    """N pairs for the paper's model or T tokens for one of SmolLM2-135M's shape, K write steps, B contexts."""

    kind: Literal["N", "T"]
    length: int
    steps: int
    batch: int

    @classmethod
    def parse(cls, text: str) -> Setting:
        """Read `N32-K5-B64` or `T256-K2-B1`."""
        match = re.fullmatch(r"([NT])(\d+)-K(\d+)-B(\d+)", text)
        if match is None:
            raise argparse.ArgumentTypeError(f"{text!r} is no setting: write it as N32-K5-B64 or T256-K2-B1")
        kind, *numbers = match.groups()
        return cls("N" if kind == "N" else "T", *map(int, numbers))

    def __str__(self) -> str:
        return f"{self.kind}{self.length}-K{self.steps}-B{self.batch}"

    def build(self) -> tuple[GradMem, Batch]:
        """The method with fixed random weights, and a batch with one query for each context."""
        if self.kind == "N":
            model = paper_model(self.length, queries=1)
            assert isinstance(model.method, GradMem)
            return model.method, model.task.batch("train", 0, self.batch)
        torch.manual_seed(0)
        method = GradMem(Backbone.from_config(SMOLLM2), n_mem=8, write_head="none", inner_lr=1.0)
        ids = torch.randint(SMOLLM2["vocab_size"], (self.batch, self.length + QUERY))
        context, queries = (
            Tokens(part, torch.ones_like(part, dtype=torch.bool)) for part in ids.split([self.length, QUERY], 1)
        )
        return method, Batch(context, queries, queries.ids.clone(), torch.arange(self.batch))


@dataclass(frozen=True)
class Variant:
    """One way to do the step."""

    name: str
    strategy: Strategy | None = None
    precision: Precision = "fp32"


NAIVE, OURS = Variant("naive"), Variant("recompute fp32", "recompute")
VARIANTS = [
    NAIVE,
    OURS,
    Variant("recompute bf16", "recompute", "bf16"),
    Variant("unroll fp32", "unroll"),
    Variant("unroll bf16", "unroll", "bf16"),
    Variant("compile bf16", "compile", "bf16"),
]
DEFAULTS = list(map(Setting.parse, ("N32-K1-B64", "N32-K5-B16", "N96-K5-B4", "N96-K20-B8", "T256-K2-B1")))


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

    def __init__(self, method: GradMem, batch: Batch, steps: int, variant: Variant) -> None:
        method.strategy = variant.strategy or "unroll"
        self.step, self.batch, self.steps = MetaStep(method, variant.precision), batch, steps

    def __call__(self) -> Tensor:
        """Return the outer loss."""
        scored = self.batch.labels != -100
        loss, write_loss, _ = self.step(self.batch, self.steps, scored)
        return loss / scored.sum() + WRITE_LOSS_WEIGHT * write_loss


class NaiveStep:
    """The step of `naive.py`."""

    def __init__(self, method: GradMem, batch: Batch, steps: int) -> None:
        self.method, self.batch, self.steps = method, batch, steps
        self.plain = plain_model(method, "eager")

    def __call__(self) -> Tensor:
        """Return the outer loss."""
        method, batch = self.method, self.batch
        self.plain.zero_grad()
        loss, write_loss = naive.meta_loss(
            self.plain,
            method.write_head or self.plain.get_output_embeddings(),
            method.initial_memory,
            method.options.inner_lr,
            self.steps,
            batch.context.ids,
            batch.queries.ids,
            batch.labels,
        )
        return loss + WRITE_LOSS_WEIGHT * write_loss


def run(setting: Setting, variant: Variant, repeats: int, threads: int, profile: bool = False) -> Run:
    """Measure one variant; to be called in a fresh process."""
    torch.set_num_threads(threads)
    method, batch = setting.build()
    step = (
        NaiveStep(method, batch, setting.steps)
        if variant.strategy is None
        else OurStep(method, batch, setting.steps, variant)
    )
    losses = []

    def once() -> None:
        method.zero_grad()
        loss = step()
        loss.backward()
        losses.append(loss.item())

    if variant.strategy == "compile":
        once()  # compiling takes memory of its own
    before = forget_peak(CPU)
    took = seconds(once, repeats)
    used = (peak(CPU) - before) / 1e6
    if profile:
        with torch.profiler.profile() as recorded:
            once()
        print(f"{setting}, {variant.name}")
        print(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=40))
    gradient = method.initial_memory.grad
    assert gradient is not None
    return Run(took, used, losses[-1], gradient.flatten().tolist())


def disagreement(one: Run, other: Run) -> float:
    """Relative difference of the losses, or of the gradients of the initial memory where that is larger."""
    gradients = torch.tensor([one.gradient, other.gradient])
    gradient = float((gradients[0] - gradients[1]).norm() / gradients[0].norm())
    return max(abs(one.loss - other.loss) / abs(one.loss), gradient)


def job(setting: Setting, variant: Variant, repeats: int, threads: int, profile: bool, runs: Runs) -> Row:
    """Measure one variant in a fresh process, keep its run, and make its row."""
    row: Row = {"setting": str(setting), "variant": variant.name}
    if variant.strategy != "recompute":
        # Memory grows with steps and contexts: a run that cannot end well is not begun.
        kept = replace(variant, strategy="unroll") if variant.strategy == "compile" else variant
        one = in_fresh_process(run, replace(setting, steps=1, batch=1), kept, 1, threads)
        need, free = one.peak_mb * setting.steps * setting.batch, free_memory(CPU) / 1e6
        if need > free:
            return {**row, "note": f"not run: needs about {need / 1000:.0f} GB of {free / 1000:.0f}"}
    try:
        done = in_fresh_process(run, setting, variant, repeats, threads, profile)
    except BrokenProcessPool:
        return {**row, "note": "process was killed: out of memory?"}
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
            problems.append(f"{setting}: {OURS.name} did not run")
            continue
        if (setting, NAIVE.name) not in runs:
            print(f"{setting}: naive did not run, so nothing is compared")
            continue
        apart = disagreement(runs[setting, NAIVE.name], runs[setting, OURS.name])
        print(f"{setting}: loss and meta-gradient of naive and {OURS.name} agree to {apart:.1e}")
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
        metavar="N32-K5-B16",
        default=argparse.SUPPRESS,
        help="N pairs or T tokens (SmolLM2-135M's shape), write steps and batch; may be repeated "
        f"(default: {' '.join(map(str, DEFAULTS))})",
    )
    command.add_argument("--profile", action="store_true", help="print where the time of one more step goes")
    options = command.parse_args()
    settings = getattr(options, "setting", DEFAULTS)
    where = machine(options.threads, "fp32 unless the variant says otherwise")
    runs: Runs = {}
    rows = measure(
        "meta-training steps",
        [
            partial(job, setting, variant, options.repeats, options.threads, options.profile, runs)
            for setting in settings
            for variant in VARIANTS
        ],
    )
    report("One meta-training step (ratios: to naive)", rows, where, options.json)
    problems = check(runs)
    if options.threads >= 2:
        for setting in too_slow(rows):
            print(f"{setting}: naive is slower here than the official code, so its time is no baseline")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
