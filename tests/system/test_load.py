"""The load of `load.py`, for less long."""

from __future__ import annotations

from pathlib import Path

from load import run


def test_nothing_acknowledged_is_lost_under_load(tmp_path: Path) -> None:
    result = run(tmp_path, minutes=0.6, clients=64, pause=(4, 10))
    row = result.row()
    assert row["wrong"] == []
    assert row["ended"]["SIGKILL"] >= 2
    assert row["memories_acknowledged"] > 20
    assert row["by_kind"]["ask"]["answered"] > 100
    assert row["right"] > 0.97  # what the checkpoint can
    assert row["resident_bytes"] < 2**30
