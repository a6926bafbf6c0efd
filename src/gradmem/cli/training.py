"""Commands that train: train and plan, as plain functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from rich.table import Table
from safetensors import SafetensorError

from ..errors import GradmemError
from ..files import save_json
from ..training.recipe import Recipe
from .console import console, progress_bar


def train(recipe: Recipe, output: Path, resume: Literal["auto", "never"] = "auto") -> None:
    """Train a recipe; the checkpoint is saved in OUTPUT/checkpoint after each stage.

    Parameters
    ----------
    recipe
        What to train.
    output
        Directory of the run: recipe, log (CSV and TensorBoard), resumable states, checkpoint.
    resume
        auto: continue from the newest state if there is one; never: refuse to. Ctrl-C and SIGTERM save a state.
    """
    with _training_packages():
        from ..training.state import states
        from ..training.trainer import Trainer
    from .training_report import ConsoleReport

    try:
        trainer = Trainer(recipe, output, resume, ConsoleReport(len(recipe.stages)))
        trainer.run()
    except (OSError, SafetensorError) as error:
        raise GradmemError(f"cannot write to {output}: {error}; the last state is kept") from error
    except KeyboardInterrupt:
        kept = states(output / "states")
        told = f"the same command continues from {kept[-1]}" if kept else f"there is no state in {output} to resume"
        raise KeyboardInterrupt(told) from None
    if trainer.main:
        console.print(f"checkpoint: {output / 'checkpoint'}")


def plan(recipe: Recipe, json: Path | None = None) -> list[dict[str, Any]]:
    """Measure how a recipe would train here: strategy, seconds per step and memory of each stage.

    Parameters
    ----------
    recipe
        The recipe; it is not trained.
    json
        Also save all trials to this file, as a list of rows.
    """
    with _training_packages():
        from ..training.plan import plan_recipe
    rows: list[dict[str, Any]] = []
    plans = plan_recipe(recipe)
    for number, (stage, made) in enumerate(progress_bar(plans, "measuring", len(recipe.stages)), 1):
        about = {
            "stage": number,
            "tasks": stage.tasks,
            "write_steps": max(stage.write_steps),
            "steps": stage.max_steps,
            "until_exact_match": stage.until_exact_match,
        }
        rows += [about | asdict(t) | {"chosen": t is made.chosen, "budget": made.budget} for t in made.trials]
    console.print(plan_table(rows, recipe.max_minutes))
    if json:
        console.print(f"saved {save_json(rows, json)}")
    return rows


@contextmanager
def _training_packages() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise GradmemError(f"training needs more packages ({error.name}): pip install 'gradmem[train]'") from error


def plan_table(rows: Sequence[dict[str, Any]], max_minutes: float | None = None) -> Table:
    """Table of what `plan` measured."""
    built = Table(
        title="training steps, measured here",
        caption=f"{_bound(rows, max_minutes)} {rows[0]['budget'] / 1e9:.1f} GB may be used. Chosen: the fastest "
        "that fits; a way that needs more memory must save 5 % of the time. On a CPU, seconds are processor time "
        "divided by the number of threads, which other work on the machine does not change",
    )
    for heading in ("stage", "K", "strategy", "contexts at a time", "s / step", "GB", "hours for max_steps", ""):
        built.add_column(heading, justify="left" if heading in ("strategy", "") else "right")
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        built.add_row(
            str(row["stage"]),
            str(row["write_steps"]),
            row["strategy"],
            str(row["micro_batch_size"]),
            f"{row['seconds']:.2f}",
            f"{row['bytes'] / 1e9:.2f}",
            f"{row['seconds'] * row['steps'] / 3600:.2f}",
            "chosen" if row["chosen"] else "",
            end_section=after is not None and after["stage"] != row["stage"],
        )
    return built


def _bound(rows: Sequence[dict[str, Any]], max_minutes: float | None) -> str:
    """The longest time that a run can take, and what ends it earlier."""
    chosen = [row for row in rows if row["chosen"]]
    hours = sum(row["seconds"] * row["steps"] for row in chosen) / 3600
    early = sum(row["until_exact_match"] is not None for row in chosen)
    told = f"{hours:.1f} hours if every stage takes its `max_steps`"
    if early:
        told += (
            f", which is rare: {early} of {len(chosen)} stages end as soon as they reach their `until_exact_match`, "
            "and only training shows how soon that is"
        )
    if max_minutes is not None and max_minutes / 60 < hours:
        told += f"; `max_minutes` ends the run after {max_minutes / 60:.1f} hours"
    return told + "."
