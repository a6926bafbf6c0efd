"""The log of a run: one row for each optimizer step, in `log.csv` and for TensorBoard."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FIELDS = [
    "step",
    "stage",
    "loss",
    "write_loss",
    "exact_match",
    "write_steps",
    "lr_scale",
    "grad_norm",
    "samples",
    "seconds",
]
"""Columns of `log.csv`."""
SCALARS = ["loss", "write_loss", "exact_match", "lr_scale", "grad_norm"]
"""Columns that TensorBoard shows."""


@contextmanager
def open_log(output: Path, step: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Open the log of a run, and drop the rows after the step that the run resumes from.

    Parameters
    ----------
    output : Path
        Directory of the run.
    step : int
        Optimizer steps taken so far.

    Yields
    ------
    callable
        Writes a row, a dict with the columns of `FIELDS`.
    """
    from torch.utils.tensorboard import SummaryWriter

    path = output / "log.csv"
    kept = []
    if path.exists() and step:
        with path.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(kept)
        file.flush()
        board = SummaryWriter(str(output / "tensorboard"), purge_step=step)

        def log(row: dict[str, Any]) -> None:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
            file.flush()
            for name in SCALARS:
                board.add_scalar(name, row[name], row["step"])

        try:
            yield log
        finally:
            board.close()
