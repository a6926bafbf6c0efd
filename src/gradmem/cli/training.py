"""`gradmem train` and `gradmem plan`, as plain functions like those in `gradmem.cli.memory`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError

from ..errors import GradmemError
from ..training.recipe import Recipe
from .console import console, progress_bar
from .memory_tables import plan_table


def train(recipe: Recipe, output: Path, resume: Literal["auto", "never"] = "auto") -> None:
    """Train a recipe; the checkpoint is saved in OUTPUT/checkpoint after every stage.

    Parameters
    ----------
    recipe
        What to train.
    output
        Directory of the run: recipe, log (CSV and TensorBoard), resumable states, checkpoint.
    resume
        auto: continue from the newest state where there is one; never: refuse to. Ctrl-C and SIGTERM save one.
    """
    with _training_packages():
        from ..training.state import states
        from ..training.trainer import Trainer
    try:
        trainer = Trainer(recipe, output, resume)
        trainer.run()
    except (OSError, SafetensorError) as error:
        raise GradmemError(f"cannot write to {output}: {error}; the last state is kept") from error
    except KeyboardInterrupt:
        kept = states(output / "states")
        told = f"the same command continues from {kept[-1]}" if kept else f"there is no state in {output} to go on from"
        raise KeyboardInterrupt(told) from None
    if trainer.main:
        console.print(f"checkpoint: {output / 'checkpoint'}")


def plan(recipe: Recipe, json: Path | None = None) -> list[dict[str, Any]]:
    """Measure how a recipe would train here: what is chosen for each stage, its seconds and its memory.

    Parameters
    ----------
    recipe
        What would be trained; nothing is.
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
        from ..evaluation.report import save_json

        console.print(f"saved {save_json(rows, json)}")
    return rows


@contextmanager
def _training_packages() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise GradmemError(f"training needs more packages ({error.name}): pip install 'gradmem[train]'") from error
