"""The progress of a training run, as people see it."""

from __future__ import annotations

from typing import Any

from ..training.progress import Report
from ..training.recipe import Stage
from ..training.state import RunState
from .console import new_bar, notes

EVERY = 25
"""Steps between the lines that show progress where no terminal could show a bar."""


class ConsoleReport(Report):
    """Progress on standard error: a bar on a terminal, a line now and then elsewhere.

    Parameters
    ----------
    stages : int
        Number of stages in the recipe.
    """

    def __init__(self, stages: int) -> None:
        self.stages = stages
        self.bar = new_bar()
        self.task = self.bar.add_task("", total=1, detail="")

    def __enter__(self) -> ConsoleReport:
        """Start the bar."""
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop the bar."""
        self.bar.stop()

    def begin(self, index: int, stage: Stage) -> None:
        """Start the bar of a stage."""
        options = {key: [task[key] for task in stage.tasks if key in task] for key in stage.tasks[0]}
        what = ", ".join(f"{'/'.join(map(str, dict.fromkeys(values)))} {key}" for key, values in options.items())
        parts = [f"stage {index + 1}/{self.stages}", what, f"K={'/'.join(map(str, stage.write_steps))}"]
        self.title = " ".join(filter(None, parts))
        self.bar.reset(self.task, total=stage.max_steps, description=self.title)

    def show(self, row: dict[str, Any], state: RunState) -> None:
        """Show a step."""
        match = sum(state.recent) / len(state.recent)
        numbers = f"loss {row['loss']:.3f} EM {match:.1%} {state.step / state.seconds:.2f} steps/s"
        self.bar.update(self.task, completed=state.stage_step, detail=numbers)
        if not notes.is_terminal and state.stage_step % EVERY == 0:
            self.say(f"step {state.stage_step} {numbers} lr x{row['lr_scale']:.3g}")

    def end(self, state: RunState) -> None:
        """Print a line about a stage that is over."""
        match = sum(state.recent) / max(len(state.recent), 1)
        self.say(f"done after {state.stage_step} steps, EM {match:.2%}, {state.seconds / 60:.1f} min in all")

    def say(self, text: str) -> None:
        """Print a line."""
        notes.print(f"{self.title}: {text}", highlight=False, soft_wrap=True)
