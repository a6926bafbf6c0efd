"""Commands that measure: eval, sweep, compare and calibrate, as plain functions.

Modules that import PyTorch are imported inside the functions, so that `--help` does not wait for them.
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
from ..files import save_csv, save_json
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
        Numbers of pairs, such as 32,64; default: the checkpoint's own.
    steps
        Numbers of write steps, such as 0,1,5 or 0..5; each context is written once and read after each of them, unless
        chunks are sequential; default: the checkpoint's own.
    samples
        Contexts; all of their queries are asked. Default: the whole test file, or 1000 generated contexts.
    seed
        Seed of the contexts.
    split
        Split that the contexts come from.
    precision
        Precision to which memories are rounded before they are read.
    device
        Device to run on: auto for the accelerator if there is one; or cpu, cuda, cuda:1.
    json
        Also save the results to this file, as a list of rows.
    figure
        Also draw exact match and write loss by step to this file, for one number of pairs or one task.
    task
        Options of the task that differ from the checkpoint's, each by its own name: --data DIR --tasks qa1,qa4.
    method
        How to write, where not as in training: --method.chunk_size 113 --method.chunk_mode independent, and, with
        GradMem, --method.gauss_newton_after 1: Gauss-Newton steps after the first; each costs some seven others.
    """
    from ..evaluation.figures import steps_figure
    from ..evaluation.measurement import evaluate
    from ..evaluation.result import Result
    from ..model.build import build_task
    from .evaluation_tables import results_table

    model = gradmem.load(checkpoint, method).to(device_named(device))
    given = [{**(task or {}), "pairs": n} for n in pairs] if pairs else [task or {}]
    built = [build_task({**model.spec["task"], **options}) for options in given]
    tasks = [{**options, **variant} for options, one in zip(given, built, strict=True) for variant in one.variants()]
    if figure and len(tasks) > 1:
        raise GradmemError("a figure by step shows one number of pairs, or one task: give only one")
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
    console.print(results_table(results))
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
    """Measure checkpoints at several numbers of pairs and after many numbers of write steps.

    Parameters
    ----------
    checkpoints
        Names of checkpoints, directories, or hub names.
    pairs
        Numbers of pairs, such as 4,8,16; default: each checkpoint's own.
    steps
        Numbers of write steps, such as 0..30; each context is written once and read after each; default: 0..30.
    samples
        Test contexts; all of their queries are asked.
    valid_samples
        Validation contexts that choose the best number of steps.
    seed
        Seed of the contexts.
    device
        Device to run on: auto for the accelerator if there is one; or cpu, cuda, cuda:1.
    json
        Also save all results to this file, as a list of rows.
    csv
        Also save them to this file, as a table.
    figure
        Also draw exact match by pairs to this file, beside the published curves.
    heatmap
        Also draw a heat map of checkpoints by write steps to this file, beside the published rows.
    bits
        Also draw the bits of the recalled pairs to this file, beside the bits of the memory.
    method
        How to write, if not as in training; see gradmem eval --help.
    """
    from ..experiments.sweep import Point
    from ..experiments.sweep import sweep as measure
    from ..experiments.sweep_figures import sweep_bits, sweep_by_pairs, sweep_heatmap
    from .evaluation_tables import sweep_table

    points: list[Point] = []
    for name in checkpoints:
        model = gradmem.load(name, method).to(device_named(device))
        own = getattr(model.task, "pairs", None)
        if own is None:
            raise GradmemError(f"'{name}' was not trained on key-value pairs, which a sweep is for")
        points += measure(model, pairs or [own], steps or range(31), samples, valid_samples, seed, progress_bar)
    console.print(sweep_table(points))
    rows = [row for point in points for row in point.to_dicts()]
    saved = [
        json and save_json(rows, json),
        csv and save_csv(rows, csv),
        figure and sweep_by_pairs(points, figure),
        heatmap and sweep_heatmap(points, heatmap),
        bits and sweep_bits(points, bits),
    ]
    _print_saved(saved)


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
        Recipes, each trained in OUTPUT/NAME unless that is done already, directories of earlier runs, and checkpoints.
    pairs
        Numbers of pairs; default: 4,8,16,32,64,96.
    samples
        Fresh contexts; all of their queries are asked.
    seed
        Seed of the contexts.
    output
        Directory of the runs.
    device
        Device to train and run on: auto for the accelerator if there is one; or cpu, cuda.
    json
        Also save all numbers to this file, as a list of rows.
    csv
        Also save them to this file, as a table.
    figures
        Also draw figures into this directory: exact match by pairs, by bytes and by the cost of a write, the time of
        many queries, and the pairs recalled by minutes of training.
    """
    from ..experiments.compare import compare as measure
    from ..experiments.compare_figures import draw_all
    from .evaluation_tables import cost_table, match_table

    entries = measure(
        [_system(name, output, device) for name in systems],
        pairs or [4, 8, 16, 32, 64, 96],
        samples,
        seed,
        progress=progress_bar,
    )
    console.print(match_table(entries), cost_table(entries))
    rows = [entry.to_dict() for entry in entries]
    saved = [
        json and save_json(rows, json),
        csv and save_csv(rows, csv),
        *(draw_all(entries, figures) if figures else []),
    ]
    _print_saved(saved)


def _print_saved(paths: Iterable[Path | None]) -> None:
    for path in filter(None, paths):
        console.print(f"saved {path}")


def _system(name: str, output: Path, device: str) -> tuple[gradmem.MemoryModel, Any]:
    """Load a checkpoint, the checkpoint of a run, or one that a recipe trains first."""
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
    """Fit when a checkpoint abstains, on queries with and without an answer in the context; measure it on new ones.

    Parameters
    ----------
    checkpoint
        Directory, in which abstain.safetensors is saved; or, with -o, name of a packaged checkpoint or hub name.
    samples
        Validation contexts to fit on; it is measured on a quarter as many test contexts.
    seed
        Seed of the contexts.
    device
        Device to run on: auto for the accelerator if there is one; or cpu, cuda, cuda:1.
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
    if output is None and not directory.is_dir():
        raise GradmemError(f"'{checkpoint}' is not a directory, to save abstain.safetensors in: give one with -o")
    from ..evaluation.calibrate import calibrate as fit
    from .evaluation_tables import calibration_table

    model = gradmem.load(checkpoint).to(device_named(device))
    found = fit(model, samples, seed, task, progress_bar)
    console.print(calibration_table(found))
    saved = [
        found.abstain.save(directory),
        json and save_json([found.to_dict()], json),
        figure and found.figure(figure),
    ]
    _print_saved(saved)
