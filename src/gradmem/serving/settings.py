"""Settings of a server: what it serves, and its limits."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from ..errors import GradmemError, require
from ..model.packaged import checkpoint_names
from .api_keys import ApiKeys


@dataclass(frozen=True)
class Settings:
    """What a server serves, and its limits.

    Attributes
    ----------
    host : str
        Address that the server listens on. Requests need a key unless this is a loopback address.
    checkpoints : tuple of str
        Checkpoints that clients may use. Each is loaded when it is first needed.
    max_body : int
        Most bytes of a request.
    max_requests : int
        Most requests that are served at the same time.
    max_queue : int
        Most requests that wait for the engine of one checkpoint.
    rate : int
        Most requests per minute of one key, or of one address without a key.
    timeout : float
        Most seconds that a request may take.
    device : str
        Device that the checkpoints run on; see `device_named`.
    upstream : str, optional
        Base URL of the server that answers queries to the memories of the one checkpoint; see `UpstreamEngine`.
    """

    host: str = "127.0.0.1"
    checkpoints: tuple[str, ...] = field(default_factory=lambda: tuple(checkpoint_names()))
    max_body: int = 2**23
    max_requests: int = 256
    max_queue: int = 128
    rate: int = 6000
    timeout: float = 300.0
    device: str = "auto"
    upstream: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_body", "max_requests", "max_queue", "rate", "timeout"):
            require(name, getattr(self, name), getattr(self, name) > 0, "above 0")
        if self.upstream is not None and len(self.checkpoints) != 1:
            raise GradmemError("an upstream server runs one language model: name the one checkpoint that it has")

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)

    def check_keys(self, keys: ApiKeys) -> None:
        """Raise `GradmemError` if other machines could reach the server and there are no keys."""
        if not self.local and not keys.owners():
            raise GradmemError(f"other machines can reach '{self.host}': make a key first (gradmem keys add OWNER)")


def is_loopback(host: str) -> bool:
    """Whether a host is `localhost` or a loopback address. Other names are not looked up."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
