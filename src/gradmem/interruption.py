"""Ctrl-C and SIGTERM as a wish to stop soon, for work whose state can be saved."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from typing import Any


class Interruptible:
    """While it is entered, Ctrl-C and SIGTERM only ask to stop, so that what there is can be saved; then it is true.

    A second Ctrl-C stops at once. In threads other than the main one signals keep their meaning.
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
        if not self._asked and os.environ.get("RANK", "0") == "0":  # one of several processes speaks
            with suppress(OSError):  # not through sys.stderr, which may be in the middle of a line
                os.write(2, b"stopping after this step, to save what there is; Ctrl-C again stops at once\n")
        self._asked = True
