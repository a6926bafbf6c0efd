"""`gradmem serve` as a process."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import httpx2


class Server:
    """A server that has said where it is; its log is a file.

    Parameters
    ----------
    folder : Path
    arguments : str
    before : str
        Python to run first.
    store : str
        Location of the store, by default a file in the folder.
    """

    def __init__(self, folder: Path, *arguments: str, before: str = "", store: str = "") -> None:
        self.log = folder / "log"
        program = f"{before}\nfrom gradmem.cli.main import main; raise SystemExit(main())"
        command = [sys.executable, "-c", program, "serve", "--port", "0", *arguments]
        environment = self.environment(folder) | ({"GRADMEM_STORE": store} if store else {})
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment)
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], 900)[0]:
            self.process.kill()
            raise AssertionError(f"the server does not start: {self.log.read_text()}")
        self.url = self.process.stdout.readline().decode().strip()

    @staticmethod
    def environment(folder: Path) -> dict[str, str]:
        """Where it keeps memories and keys."""
        return os.environ | {"GRADMEM_STORE": str(folder / "store.db"), "GRADMEM_KEYS": str(folder / "keys.json")}

    def metric(self, line: str) -> float:
        """The value of a metric."""
        found = [row for row in httpx2.get(f"{self.url}/metrics").text.splitlines() if row.startswith(line + " ")]
        return float(found[0].rpartition(" ")[2]) if found else 0.0

    def stop(self) -> int:
        """End it as a service manager does; return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)
