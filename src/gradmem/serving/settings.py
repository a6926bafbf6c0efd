"""What a server allows."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from ..errors import require
from ..model.loading import checkpoint_names


@dataclass(frozen=True)
class Settings:
    """Limits of a server, and what it serves.

    Attributes
    ----------
    host : str
        Address that it listens on. On a loopback address no key is needed; on any other each request needs one.
    checkpoints : tuple of str
        Checkpoints that clients may write and ask with, each loaded when it is first needed; no other ever is.
    max_body : int
        Bytes of a request.
    max_requests : int
        Requests that are served at the same time.
    max_queue : int
        Requests of one checkpoint that wait for its engine.
    rate : int
        Requests of one key, or of one address without key, in a minute.
    timeout : float
        Seconds that a request may take.
    device : str
        Device that checkpoints run on; see `device_named`.
    """

    host: str = "127.0.0.1"
    checkpoints: tuple[str, ...] = field(default_factory=lambda: tuple(checkpoint_names()))
    max_body: int = 2**23
    max_requests: int = 256
    max_queue: int = 128
    rate: int = 6000
    timeout: float = 300.0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("max_body", "max_requests", "max_queue", "rate", "timeout"):
            require(name, getattr(self, name), getattr(self, name) > 0, "above 0")

    @property
    def local(self) -> bool:
        """Whether only this machine reaches the server."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own; a name that must be looked up is not."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
