"""Honest clients alone, and beside three hostile ones: how much longer they wait."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from clients import CHECKPOINT, PATIENCE, Account, User
from load import Killer, quantiles
from rich.table import Table


class Apart:
    """The clients of `hostile.py`, in a process of their own."""

    def __init__(self, url: str) -> None:
        command = [sys.executable, str(Path(__file__).with_name("hostile.py")), url, CHECKPOINT]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def stop(self) -> dict[str, int]:
        """End them; return what they have done."""
        done: dict[str, int] = json.loads(self.process.communicate(timeout=PATIENCE)[0])
        return done


def beside(folder: Path, minutes: float, clients: int) -> dict[str, Any]:
    """Let clients use a server half of the time alone, and half of it beside hostile ones; compare their times."""
    killer, quiet, loud = Killer(folder, 0), Account(), Account()
    done: dict[str, int] = {}
    for account, with_hostile in ((quiet, False), (loud, True)):
        over = threading.Event()
        users = [
            User(number, killer.url, account, over, f"{'loud' if with_hostile else 'quiet'}")
            for number in range(clients)
        ]
        hostile = Apart(killer.url) if with_hostile else None
        for user in users:
            user.start()
        killer.watch(30 * minutes)
        over.set()
        for user in users:
            user.join(PATIENCE)
        if hostile:
            done = hostile.stop()
    killer.end(signal.SIGTERM)
    wrong = [*quiet.wrong, *loud.wrong, *(line for line in killer.logs.splitlines() if '"status": 500' in line)]
    rows = {
        kind: {"alone": quantiles(quiet.seconds[kind]), "beside": quantiles(loud.seconds[kind])}
        for kind in sorted(quiet.seconds.keys() & loud.seconds.keys())
    }
    every = [[one for each in account.seconds.values() for one in each] for account in (quiet, loud)]
    rows["all"] = {"alone": quantiles(every[0]), "beside": quantiles(every[1])}
    return {
        "clients": clients,
        "answered": {"alone": len(every[0]), "beside": len(every[1])},
        "failed": {"alone": sum(quiet.failed.values()), "beside": sum(loud.failed.values())},
        "by_kind": rows,
        "hostile": done,
        "resident_bytes": killer.resident,
        "wrong": wrong,
    }


def beside_table(row: dict[str, Any]) -> Table:
    """Times of honest requests without and with hostile clients."""
    answered, failed = row["answered"], row["failed"]
    built = Table(
        title=f"{row['clients']} clients, alone and beside three hostile ones",
        caption=f"{answered['alone']:,} and {answered['beside']:,} honest requests answered, {failed['alone']} and "
        f"{failed['beside']} refused; hostile: {row['hostile']}; server: at most "
        f"{row['resident_bytes'] / 2**20:.0f} MB; {len(row['wrong'])} things wrong",
    )
    for heading in ("request", "p50 alone, s", "p50 beside, s", "p99 alone, s", "p99 beside, s", "p99 ratio"):
        built.add_column(heading, justify="left" if heading == "request" else "right")
    for kind, one in row["by_kind"].items():
        numbers = [one[which][what] for what in ("p50_s", "p99_s") for which in ("alone", "beside")]
        built.add_row(kind, *(f"{number:.2f}" for number in numbers), f"{numbers[3] / numbers[2]:.1f}")
    return built
