"""Commands that measure: eval, sweep, compare and calibrate, as plain functions like those in `gradmem.cli.memory`.

What computes is imported where it is used, so that `--help` need not wait for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradmem

from ..choices import Precision, Split
from ..device import device_named
from ..errors import GradmemError
from ..model.packaged import DOWNLOADABLE, checkpoint_names
from ..training.recipe import load_recipe, recipe_names
from .console import console, progress_bar
from .training import train


class Ints(list[int]):
    """Whole numbers, written as `0,1,5` or `0..5`."""

    @classmethod
    def parse(cls, text: str | int | Sequence[int]) -> Ints:
        """Parse `0,1,5`, `0..5` or a mixture.

        Raises
        ------
        ValueError
            When it is neither.
        """
        if isinstance(text, int):
            return cls([text])
        if not isinstance(text, str):
            return cls(text)
        numbers: list[int] = []
        for part in text.split(","):
            first, dots, last = part.partition("..")
            numbers.extend(range(int(first), int(last) + 1) if dots else [int(first)])
        return cls(numbers)


def measure(
    checkpoint: str,
    pairs: Ints | None = None,
    steps: Ints | None = None,
    samples: int | None = None,
    seed: int = 1,
    split: Split = "test",
    precision: Precision = "float32",
    device: str = "auto",
    json: Path | None = None,
    figure: Path | None = None,
    task: dict[str, Any] | None = None,
    method: dict[str, Any] | None = None,
) -> None:
    """Measure exact match on fresh contexts, with control rows.

    Parameters
    ----------
    checkpoint
        Name of a checkpoint, directory, or hub name.
    pairs
        Numbers of pairs, as 32,64; default: the checkpoint's own.
    steps
        Numbers of write steps, as 0,1,5 or 0..5, all read off one trajectory where chunks are not sequential;
        default: the checkpoint's own.
    samples
        Contexts; all of their queries are asked. Default: all of a test file, 1000 where contexts are generated.
    seed
        Seed of the contexts.
    split
        Split that the contexts are of.
    precision
        Precision that memories are stored in before they are read.
    device
        Device to run on: auto for the accelerator where there is one; or cpu, cuda, cuda:1.
    json
        Also save the results to this file, as a list of rows.
    figure
        Also draw exact match and write loss by step to this file (one number of pairs, or one task, only).
    task
        Options of the task that differ from the checkpoint's, each by its own name: --data DIR --tasks qa1,qa4.
    method
        How to write, where not as in training: --method.chunk_size 113 --method.chunk_mode independent, and, with
        GradMem, --method.gauss_newton_after 1: Gauss-Newton steps after the first; each costs some seven others.
    """
    from ..evaluation.measurement import Result, evaluate
    from ..evaluation.report import save_json, steps_figure, table
    from ..model.build import build_task

    model = gradmem.load(checkpoint, method).to(device_named(device))
    given = [{**(task or {}), "pairs": n} for n in pairs] if pairs else [task or {}]
    built = [build_task({**model.spec["task"], **options}) for options in given]
    tasks = [{**options, **variant} for options, one in zip(given, built, strict=True) for variant in one.variants()]
    if figure and len(tasks) > 1:
        raise GradmemError("a figure by step shows one number of pairs, or one task: give one")
    results: list[Result] = []
    for options in tasks:
        results += evaluate(
            model,
            steps,
            samples,
            seed,
            split,
            options,
            convert=lambda memory: memory.rounded(precision),
            progress=progress_bar,
        )
    console.print(table(results))
    if json:
        console.print(f"saved {save_json([result.to_dict() for result in results], json)}")
    if figure:
        title = f"{checkpoint}: {results[0].samples} fresh contexts, seed {seed}"
        console.print(f"saved {steps_figure(results, figure, title)}")
    for note in dict.fromkeys(note for one in built for note in one.notes(split)):
        console.print(note, markup=False, highlight=False)


def sweep(
    checkpoints: list[str],
    pairs: Ints | None = None,
    steps: Ints | None = None,
    samples: int = 500,
    valid_samples: int = 200,
    seed: int = 1,
    device: str = "auto",
    json: Path | None = None,
    csv: Path | None = None,
    figure: Path | None = None,
    heatmap: Path | None = None,
    bits: Path | None = None,
    method: dict[str, Any] | None = None,
) -> None:
    """Measure checkpoints at several numbers of pairs, after every number of steps up to many more than trained.

    Parameters
    ----------
    checkpoints
        Names of checkpoints, directories, or hub names.
    pairs
        Numbers of pairs, as 4,8,16; default: each checkpoint's own.
    steps
        Numbers of write steps, as 0..30, all read off one trajectory; default: 0..30.
    samples
        Test contexts; all of their queries are asked.
    valid_samples
        Validation contexts, which choose the best number of steps.
    seed
        Seed of the contexts.
    device
        Device to run on: auto for the accelerator where there is one; or cpu, cuda, cuda:1.
    json
        Also save all results to this file, as a list of rows.
    csv
        Also save them to this file, as a table.
    figure
        Also draw exact match by pairs to this file, beside the paper's.
    heatmap
        Also draw trained by evaluated steps to this file, beside the paper's.
    bits
        Also draw the bits that are recalled to this file, against those of the memory.
    method
        How to write, where not as in training; see gradmem eval --help.
    """
    from ..evaluation.report import save_csv, save_json
    from ..experiments.sweep import Point, bits_figure, pairs_figure, steps_figure, table
    from ..experiments.sweep import sweep as measure

    points: list[Point] = []
    for name in checkpoints:
        model = gradmem.load(name, method).to(device_named(device))
        own = getattr(model.task, "pairs", None)
        if own is None:
            raise GradmemError(f"'{name}' was trained on no number of pairs: a sweep is for key-value tasks")
        points += measure(model, pairs or [own], steps or range(31), samples, valid_samples, seed, progress_bar)
    console.print(table(points))
    rows = [row for point in points for row in point.to_dicts()]
    saved = [
        json and save_json(rows, json),
        csv and save_csv(rows, csv),
        figure and pairs_figure(points, figure),
        heatmap and steps_figure(points, heatmap),
        bits and bits_figure(points, bits),
    ]
    _tell_saved(saved)


def compare(
    systems: list[str],
    pairs: Ints | None = None,
    samples: int = 500,
    seed: int = 1,
    output: Path = Path("runs"),
    device: str = "auto",
    json: Path | None = None,
    csv: Path | None = None,
    figures: Path | None = None,
) -> None:
    """Compare systems on the same contexts: what each stores, in how many bytes, at what cost.

    Parameters
    ----------
    systems
        Recipes, each trained in OUTPUT/NAME where that is not done yet, directories of earlier runs, and checkpoints.
    pairs
        Numbers of pairs; default: 4,8,16,32,64,96.
    samples
        Fresh contexts; all of their queries are asked.
    seed
        Seed of the contexts.
    output
        Directory of the runs.
    device
        Device to train and run on: auto for the accelerator where there is one; or cpu, cuda.
    json
        Also save all numbers to this file, as a list of rows.
    csv
        Also save them to this file, as a table.
    figures
        Also draw exact match by pairs, by bytes and by the cost of a write, the time of many queries, and the pairs
        recalled by minutes of training, in this directory.
    """
    from ..evaluation.report import save_csv, save_json
    from ..experiments import compare as comparison

    entries = comparison.compare(
        [_system(name, output, device) for name in systems],
        pairs or [4, 8, 16, 32, 64, 96],
        samples,
        seed,
        progress=progress_bar,
    )
    console.print(comparison.match_table(entries), comparison.cost_table(entries))
    rows = [entry.to_dict() for entry in entries]
    saved = [
        json and save_json(rows, json),
        csv and save_csv(rows, csv),
        *(comparison.figures(entries, figures) if figures else []),
    ]
    _tell_saved(saved)


def _tell_saved(paths: Iterable[Path | None]) -> None:
    for path in filter(None, paths):
        console.print(f"saved {path}")


def _system(name: str, output: Path, device: str) -> tuple[gradmem.MemoryModel, Any]:
    """Load a checkpoint, that of a run, or what a recipe trains."""
    from ..experiments.compare import Training

    run, packaged = Path(name), name in {*checkpoint_names(), *DOWNLOADABLE}
    if not packaged and (name in recipe_names() or name.endswith((".yaml", ".yml"))):
        run = output / run.stem
        train(replace(load_recipe(name), device=device), run)
    elif packaged or not (run / "checkpoint").is_dir():
        return gradmem.load(name).to(device_named(device)), Training()
    model = gradmem.load(run / "checkpoint").to(device_named(device))
    model.name = run.name
    return model, Training.of(run)


def calibrate(
    checkpoint: str,
    samples: int = 1000,
    seed: int = 1,
    device: str = "auto",
    output: Path | None = None,
    json: Path | None = None,
    figure: Path | None = None,
    task: dict[str, Any] | None = None,
) -> None:
    """Fit when a checkpoint abstains, on queries whose answer was and was not written, and measure it on fresh ones.

    Parameters
    ----------
    checkpoint
        Name of a checkpoint, directory, or hub name; abstain.safetensors is saved in a directory.
    samples
        Validation contexts to fit on; a fourth as many test contexts are measured on.
    seed
        Seed of the contexts.
    device
        Device to run on: auto for the accelerator where there is one; or cpu, cuda, cuda:1.
    output
        Directory to save abstain.safetensors in (short: -o); default: the checkpoint's.
    json
        Also save what was measured to this file.
    figure
        Also draw the reliability diagram to this file.
    task
        Options of the task that differ from the checkpoint's, each by its own name: --pairs 8.
    """
    directory = output or Path(checkpoint)
    if not directory.is_dir():
        raise GradmemError(f"'{directory}' is no directory to save abstain.safetensors in: name one with -o")
    from ..evaluation import calibrate as calibration
    from ..evaluation.report import save_json

    model = gradmem.load(checkpoint).to(device_named(device))
    found = calibration.calibrate(model, samples, seed, task, progress_bar)
    console.print(found.table())
    saved = [
        found.abstain.save(directory),
        json and save_json([found.to_dict()], json),
        figure and found.figure(figure),
    ]
    _tell_saved(saved)
