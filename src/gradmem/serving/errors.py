"""Errors of the engine and the server that are not tied to HTTP."""

from __future__ import annotations

from ..errors import GradmemError


class Busy(GradmemError):
    """Too many requests are waiting.

    Attributes
    ----------
    retry_after : float
        Seconds until the waiting requests are expected to be finished.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Closed(GradmemError):
    """The engine accepts no more requests."""


class Stuck(GradmemError):
    """An engine makes no progress."""


class NotServed(GradmemError):
    """This server does not serve the checkpoint of the memory."""


class ClientDisconnected(Exception):
    """The client closed the connection before the request was answered."""
