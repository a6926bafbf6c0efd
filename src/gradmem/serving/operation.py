"""Paths for whoever operates the server: health, readiness and metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Depends, Response
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from .http_errors import ERROR_RESPONSES
from .telemetry import Telemetry

CHECK_SECONDS = 5.0
"""Most seconds of a check."""
READY_SECONDS = 1.0
"""Seconds for which it is remembered that the server is ready: many may ask."""
BEARER = Depends(HTTPBearer(auto_error=False, description="A key of `gradmem keys add`; not needed on loopback."))
"""The guard checks the key; this only documents it in the OpenAPI document."""


def operation(telemetry: Telemetry, check: Callable[[], Coroutine[Any, Any, None]]) -> APIRouter:
    """Build the routes.

    Parameters
    ----------
    telemetry : Telemetry
    check : callable
        Raises an error if the server cannot answer requests.
    """
    router, turn, until = APIRouter(tags=["operation"]), asyncio.Lock(), 0.0

    @router.get("/healthz", responses=ERROR_RESPONSES)
    async def health() -> dict[str, str]:
        """Answer that the server is running."""
        return {"status": "ok"}

    @router.get("/readyz", responses=ERROR_RESPONSES)
    async def ready() -> dict[str, str]:
        """Answer that the server can serve requests: the store can be used, and no checkpoint has got stuck."""
        nonlocal until
        async with turn:
            if time.monotonic() > until:
                await asyncio.wait_for(check(), CHECK_SECONDS)
                until = time.monotonic() + READY_SECONDS
        return {"status": "ready"}

    @router.get("/metrics", include_in_schema=False, dependencies=[BEARER])
    async def metrics() -> Response:
        """Return metrics for Prometheus."""
        return Response(generate_latest(telemetry.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return router
