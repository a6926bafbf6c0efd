"""Exact match at 16 pairs against training time: our recipe, the published one, and the published one made fair.

Every arm trains from scratch with the same threads and is measured on the same validation contexts, whenever it
saves its state; the clock stops for measuring. The clock is the processor time of the training process, which other
work on the machine does not add to (with one thread alone on a core it is wall-clock time; that is written too).
The published arms differentiate the plain unroll, as the published code does. The fair one warms up for 200 steps
instead of 10,000, with that of three learning rates which has the lowest loss after a quarter of the time.

A stopped run goes on where its arms stood.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.common import Row, machine, parser, report
from gradmem.cli.training_report import ConsoleReport
from gradmem.evaluation.figures import figure
from gradmem.evaluation.measurement import evaluate
from gradmem.training.recipe import Recipe, load_recipe
from gradmem.training.trainer import Trainer

PAIRS, CONTEXTS = 16, 64
TARGET = 0.95
LEARNING_RATES = [1e-4, 3e-4, 1e-3]
FIELDS = ["step", "cpu_seconds", "wall_seconds", "samples", "exact_match"]
Clock = Callable[[], float]


class Enough(Exception):
    """The time of an arm is over."""


class TimedTrainer(Trainer):
    """A trainer that writes its curve and stops when its time is over.

    Parameters
    ----------
    recipe : Recipe
    output : Path
    seconds : float
        Processor time after which to stop.
    plain : bool
        Differentiate the plain unroll in float32, with the model's own attention, MLPs and norms.
    """

    def __init__(self, recipe: Recipe, output: Path, seconds: float, plain: bool) -> None:
        super().__init__(recipe, output, report=ConsoleReport(len(recipe.stages)))
        self.budget, self.curve = seconds, output / "curve.csv"
        if plain:
            backbone = self.model.method.backbone
            backbone.double_backward_attention, backbone.closed_forms = "eager", {}
        rows = [row for row in read(self.curve) if row["step"] <= self.state.step]
        write(self.curve, rows)
        last = rows[-1] if rows else dict.fromkeys(FIELDS, 0.0)
        self.clocks: dict[str, tuple[Clock, float]] = {
            "cpu_seconds": (time.process_time, time.process_time() - last["cpu_seconds"]),
            "wall_seconds": (time.monotonic, time.monotonic() - last["wall_seconds"]),
        }

    def now(self) -> dict[str, float]:
        """Seconds of training so far."""
        return {name: clock() - start for name, (clock, start) in self.clocks.items()}

    def _save(self) -> None:
        super()._save()
        now = self.now()
        stage = self.recipe.stages[min(self.state.stage, len(self.recipe.stages) - 1)]
        self.model.method.eval()
        found = evaluate(self.model, [max(stage.write_steps)], CONTEXTS, 0, "valid", {"pairs": PAIRS, "queries": None})
        self.model.method.train()
        row = {"step": self.state.step, **now, "samples": self.state.samples, "exact_match": found[0].exact_match}
        write(self.curve, [*read(self.curve), row])
        self.clocks = {name: (clock, clock() - now[name]) for name, (clock, _) in self.clocks.items()}
        if now["cpu_seconds"] >= self.budget:
            raise Enough


def read(path: Path) -> list[dict[str, float]]:
    """Rows of a curve; none where there is no file yet."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def write(path: Path, rows: Sequence[dict[str, float]]) -> None:
    """Write a curve."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)


def fair(learning_rate: float) -> Recipe:
    """The published recipe with 200 warm-up steps and another learning rate."""
    recipe = load_recipe(
        "kv-16-published", adamw_lr=learning_rate, save_every=100, strategy="unroll", micro_batch_size=64
    )
    recipe.stages = [replace(recipe.stages[0], warmup_steps=200)]
    return recipe


def run(name: str, recipe: Recipe, output: Path, seconds: float, plain: bool) -> list[dict[str, float]]:
    """Train an arm to the end of its time or of its recipe; return its curve."""
    directory = output / name
    curve = read(directory / "curve.csv")
    if (directory / "done").exists() or (curve and curve[-1]["cpu_seconds"] >= seconds):
        return curve
    print(f"{name}: " + (f"going on after {curve[-1]['cpu_seconds'] / 60:.0f} min" if curve else "from scratch"))
    try:
        TimedTrainer(recipe, directory, seconds, plain).run()
        (directory / "done").touch()
    except Enough:
        pass
    return read(directory / "curve.csv")


def arms(output: Path, seconds: float) -> dict[str, list[dict[str, float]]]:
    """Run all arms."""
    curves = {"ours": run("ours", load_recipe("kv-16", save_every=25), output, seconds, plain=False)}
    tried = {}
    for rate in LEARNING_RATES:
        name = f"fair-{rate:g}"
        tried[rate] = trial(run(name, fair(rate), output, seconds / 4, plain=True), output / name, seconds / 4)
    best = min(tried, key=lambda rate: tried[rate])
    slow = load_recipe("kv-16-published", save_every=100, strategy="unroll", micro_batch_size=64)
    curves["published"] = run("published", slow, output, seconds, plain=True)
    name = f"published, made fair (lr {best:g})"
    curves[name] = run(f"fair-{best:g}", fair(best), output, seconds, plain=True)
    return curves


def trial(curve: Sequence[dict[str, float]], directory: Path, seconds: float) -> float:
    """Mean loss of the last 100 steps of an arm's trial; its exact match may still be chance."""
    end = next((row for row in curve if row["cpu_seconds"] >= seconds), curve[-1])
    with (directory / "log.csv").open(newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file) if int(row["step"]) <= end["step"]][-100:]
    return sum(losses) / len(losses)


def summary(name: str, curve: Sequence[dict[str, float]]) -> Row:
    """When an arm arrived, or the bound where it did not."""
    reached = [row for row in curve if row["exact_match"] >= TARGET]
    return {
        "arm": name,
        f"cpu minutes to {TARGET:.0%}": f"{reached[0]['cpu_seconds'] / 60:.1f}"
        if reached
        else f"> {curve[-1]['cpu_seconds'] / 60:.0f}",
        "best EM %": 100 * max(row["exact_match"] for row in curve),
        "last EM %": 100 * curve[-1]["exact_match"],
        "cpu minutes": curve[-1]["cpu_seconds"] / 60,
        "wall minutes": curve[-1]["wall_seconds"] / 60,
        "steps": int(curve[-1]["step"]),
        "contexts": int(curve[-1]["samples"]),
    }


def draw(curves: dict[str, list[dict[str, float]]], path: Path, threads: int) -> None:
    """Draw exact match against processor time."""
    with figure(path) as axis:
        for name, curve in curves.items():
            minutes = [row["cpu_seconds"] / 60 for row in curve]
            axis.plot(minutes, [100 * row["exact_match"] for row in curve], marker=".", label=name)
        axis.axhline(100 * TARGET, color="grey", linewidth=0.8, linestyle=":")
        axis.set(xlabel=f"training time, processor minutes ({threads} thread)", ylabel="exact match, %", ylim=(-3, 103))
        axis.set_title(f"{PAIRS} pairs in 8 vectors of 128, from scratch; {CONTEXTS} validation contexts, seed 0")
        axis.legend(frameon=False)


def main() -> None:
    """Command line."""
    command = parser(__doc__, repeats=None)
    command.add_argument("--minutes", type=float, default=60.0, metavar="M", help="processor minutes for each arm")
    command.add_argument("--output", type=Path, default=Path("runs/time-to-accuracy"), metavar="DIR", help="runs")
    command.add_argument("--figure", type=Path, default=None, metavar="FILE", help="draw the curves")
    command.add_argument("--csv", type=Path, default=None, metavar="FILE", help="write the curves")
    command.set_defaults(threads=1)
    options = command.parse_args()
    torch.set_num_threads(options.threads)
    curves = arms(options.output, 60 * options.minutes)
    report(
        f"Time to {TARGET:.0%} exact match at {PAIRS} pairs",
        [summary(name, curve) for name, curve in curves.items()],
        machine(options.threads, "ours auto, published fp32"),
        options.json,
    )
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["arm", *FIELDS])
            writer.writeheader()
            writer.writerows({"arm": name, **row} for name, curve in curves.items() for row in curve)
    if options.figure:
        draw(curves, options.figure, options.threads)


if __name__ == "__main__":
    main()
