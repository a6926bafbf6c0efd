"""What a run reports while it trains. This module shows nothing: whoever wants to see progress subclasses `Report`."""

from __future__ import annotations

from typing import Any

from .recipe import Stage
from .state import RunState


class Report:
    """Receives the progress of a run and ignores it: the default of `Trainer`, and all that side processes need."""

    def __enter__(self) -> Report:
        """The run begins."""
        return self

    def __exit__(self, *error: object) -> None:
        """The run ends, with or without an error."""

    def begin(self, index: int, stage: Stage) -> None:
        """A stage begins; `index` counts from 0."""

    def show(self, row: dict[str, Any], state: RunState) -> None:
        """A step was taken; `row` is its row in the log."""

    def end(self, state: RunState) -> None:
        """A stage is over."""

    def say(self, text: str) -> None:
        """A note on the stage, in one line."""
