"""How long work reports its progress without knowing who shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Progress = Callable[..., Iterable[Any]]
"""`progress(steps, title, total)` yields the steps unchanged and may show them, as `rich.progress.track` does."""


def silent(steps: Iterable[Any], title: str = "", total: int | None = None) -> Iterable[Any]:
    """Show nothing: the default wherever a `Progress` is taken."""
    return steps
