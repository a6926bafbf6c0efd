"""Ctrl-C and SIGTERM as a request to stop soon, so that work in progress can be saved."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from typing import Any


class Interruptible:
    """A context manager that is true after Ctrl-C or SIGTERM, which do not stop the process inside it.

    A second Ctrl-C stops the process at once. Outside the main thread signals are not caught.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __bool__(self) -> bool:
        return self._asked

    def __enter__(self) -> Interruptible:
        if threading.current_thread() is threading.main_thread():
            self._before = {one: signal.signal(one, self._ask) for one in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)

    def _ask(self, number: int, frame: object) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._asked and os.environ.get("RANK", "0") == "0":  # of several processes only one prints
            with suppress(OSError):  # sys.stderr is not safe in a signal handler
                os.write(2, b"stopping after this step to save the work; press Ctrl-C again to stop at once\n")
        self._asked = True
