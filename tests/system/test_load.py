"""The load of `load.py`, for less long."""

from __future__ import annotations

from pathlib import Path

from beside import beside
from load import run


def test_nothing_acknowledged_is_lost_under_load(tmp_path: Path) -> None:
    result = run(tmp_path, minutes=0.6, clients=64, pause=(4, 10))
    row = result.to_dict()
    assert row["wrong"] == []
    assert row["ended"]["SIGKILL"] >= 2
    assert row["memories_acknowledged"] > 20
    assert row["by_kind"]["ask"]["answered"] > 100
    assert row["right"] > 0.97  # what the checkpoint can
    assert row["resident_bytes"] < 2**30


def test_hostile_clients_beside_them_break_nothing(tmp_path: Path) -> None:
    row = beside(tmp_path, minutes=0.6, clients=16)
    assert row["wrong"] == []
    assert row["answered"]["beside"] > 20
    assert row["failed"]["beside"] == 0
    large = {kind: count for kind, count in row["hostile"].items() if kind.startswith("large")}
    assert sum(large.values()) > 3
    assert all(kind.endswith(("413", "422", "503")) for kind in large)
