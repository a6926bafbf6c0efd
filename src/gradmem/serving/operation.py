"""Paths for whoever operates the server: health, readiness and metrics."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Depends, Response
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from .errors import Closed
from .http_errors import ERROR_RESPONSES
from .telemetry import Telemetry

CHECK_SECONDS = 5.0
"""Most seconds of a check."""
READY_SECONDS = 1.0
"""Seconds for which it is remembered that the server is ready: many may ask."""
WATCHED_SECONDS = 30.0
"""Seconds after a question whether the server is ready in which whoever asked is taken to ask again."""
BEARER = Depends(HTTPBearer(auto_error=False, description="A key of `gradmem keys add`; not needed on loopback."))
"""The guard checks the key; this only documents it in the OpenAPI document."""


class Readiness:
    """Whether a server can answer requests.

    Parameters
    ----------
    check : callable
        Raises an error if the server cannot answer requests.

    Attributes
    ----------
    leaving : bool
        Whether the server is about to end, and asks those who send it requests to send them elsewhere.
    """

    def __init__(self, check: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._check, self._turn = check, asyncio.Lock()
        self._until, self._asked = 0.0, -math.inf
        self.leaving = False

    @property
    def watched(self) -> bool:
        """Whether somebody, as a proxy does, keeps asking if the server is ready."""
        return time.monotonic() - self._asked < WATCHED_SECONDS

    async def check(self) -> None:
        """Raise an error if the server cannot answer requests, or soon will not."""
        self._asked = time.monotonic()
        async with self._turn:
            if self.leaving:
                raise Closed("the server is about to end")
            if time.monotonic() > self._until:
                await asyncio.wait_for(self._check(), CHECK_SECONDS)
                self._until = time.monotonic() + READY_SECONDS


def operation(telemetry: Telemetry, readiness: Readiness) -> APIRouter:
    """Build the routes."""
    router = APIRouter(tags=["operation"])

    @router.get("/healthz", responses=ERROR_RESPONSES)
    async def health() -> dict[str, str]:
        """Answer that the server is running."""
        return {"status": "ok"}

    @router.get("/readyz", responses=ERROR_RESPONSES)
    async def ready() -> dict[str, str]:
        """Answer that the server can serve requests: the store can be used, and no checkpoint has got stuck."""
        await readiness.check()
        return {"status": "ready"}

    @router.get("/metrics", include_in_schema=False, dependencies=[BEARER])
    async def metrics() -> Response:
        """Return metrics for Prometheus."""
        return Response(generate_latest(telemetry.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return router
