"""How the progress of a run is shown."""

from __future__ import annotations

from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..cli.console import Console
from .recipe import Stage
from .state import Place


class Report:
    """Progress of a run: a live bar on a terminal, a line now and then elsewhere."""

    EVERY = 25

    def __init__(self, console: Console, stages: int) -> None:
        self.console, self.stages = console, stages
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("", total=1, numbers="")

    def __enter__(self) -> Report:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def begin(self, index: int, stage: Stage) -> None:
        """Start the bar of a stage."""
        options = {key: [task[key] for task in stage.tasks if key in task] for key in stage.tasks[0]}
        what = ", ".join(f"{'/'.join(map(str, dict.fromkeys(values)))} {key}" for key, values in options.items())
        self.title = f"stage {index + 1}/{self.stages} {what} K={'/'.join(map(str, stage.write_steps))}"
        self.bar.reset(self.task, total=stage.max_steps, description=self.title)

    def show(self, row: dict[str, Any], place: Place) -> None:
        """Show a step."""
        numbers = self._numbers(row["loss"], place)
        self.bar.update(self.task, completed=place.stage_step, numbers=numbers)
        if not self.console.is_terminal and place.stage_step % self.EVERY == 0:
            rates = f"lr x{row['lr_scale']:.3g}"
            self.console.print(f"{self.title}: step {place.stage_step} {numbers} {rates}", highlight=False)

    def end(self, place: Place) -> None:
        """Leave a line behind for a stage that is done."""
        match = sum(place.recent) / max(len(place.recent), 1)
        self.console.print(
            f"{self.title}: done after {place.stage_step} steps, EM {match:.2%}, {place.seconds / 60:.1f} min in all",
            highlight=False,
        )

    def say(self, text: str) -> None:
        """Leave a line behind."""
        self.console.print(f"{self.title}: {text}", highlight=False)

    def _numbers(self, loss: float, place: Place) -> str:
        match = sum(place.recent) / len(place.recent)
        return f"loss {loss:.3f} EM {match:.1%} {place.step / place.seconds:.2f} steps/s"
