"""The logs of a run, as files and for TensorBoard: optimizer steps in `log.csv`, validations in `valid.csv`."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

STEPS = [
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
VALIDATIONS = [
    "step",
    "stage",
    "samples",
    "seconds",
    "write_steps",
    "exact_match",
    "low",
    "high",
    "write_loss",
    "unwritten",
    "swapped",
]
"""Columns of `valid.csv`; low and high are the 95 % interval of exact match."""
SHOWN = {"loss", "write_loss", "exact_match", "lr_scale", "grad_norm", "unwritten", "swapped"}
"""Columns that TensorBoard shows."""


class RunLog:
    """The open logs of a run.

    Parameters
    ----------
    output : Path
        Directory of the run.
    step : int
        Optimizer steps taken so far; rows after them are dropped.
    """

    def __init__(self, output: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._steps = _Table(output / "log.csv", STEPS, step)
        self._validations = _Table(output / "valid.csv", VALIDATIONS, step)
        self._board = SummaryWriter(str(output / "tensorboard"), purge_step=step)

    def close(self) -> None:
        """Close the files."""
        for one in (self._steps, self._validations, self._board):
            one.close()

    def step(self, row: dict[str, Any]) -> None:
        """Write an optimizer step, a dict with the columns of `STEPS`."""
        self._write(self._steps, row, "")

    def validation(self, row: dict[str, Any]) -> None:
        """Write a validation, a dict with the columns of `VALIDATIONS`."""
        self._write(self._validations, row, f"valid/{row['write_steps']} write steps/")

    def _write(self, table: _Table, row: dict[str, Any], group: str) -> None:
        table.write({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        for name in SHOWN & row.keys():
            self._board.add_scalar(group + name, row[name], row["step"])


class _Table:
    """A CSV file that is written on."""

    def __init__(self, path: Path, columns: list[str], step: int) -> None:
        kept = []
        if path.exists() and step:
            with path.open(newline="") as file:
                kept = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
        self._file = path.open("w", newline="")
        self._writer = csv.DictWriter(self._file, columns)
        self._writer.writeheader()
        self._writer.writerows(kept)
        self._file.flush()

    def write(self, row: dict[str, Any]) -> None:
        self._writer.writerow(row)
        self._file.flush()

    def close(self) -> None:
        self._file.close()
