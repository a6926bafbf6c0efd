"""The HTTP API as one ASGI application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Response
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from .. import __version__
from ..errors import GradmemError
from ..store import Store
from . import http_errors
from .api_keys import Keys
from .engine_pool import Engines
from .guard import Guard
from .owned import Threads
from .routes import checkpoints, memories, openai
from .settings import Settings
from .telemetry import Watch

WEB = Path(__file__).parent / "web"
"""The web page: every file in it is served under `/`."""
ABOUT = "Memory for language models: written once, asked many times."


def create_app(store: Store, settings: Settings | None = None, keys: Keys | None = None) -> FastAPI:
    """Build the application.

    Parameters
    ----------
    store : Store
        Closed when the application ends.
    settings : Settings, optional
    keys : Keys, optional

    Raises
    ------
    GradmemError
        When others than this machine could reach it and there are no keys.
    """
    settings, keys = settings or Settings(), keys or Keys()
    if not settings.local and not keys.owners():
        raise GradmemError(f"'{settings.host}' is no loopback address: make a key first (gradmem keys add OWNER)")
    engines, watch = Engines(settings.checkpoints, settings.max_queue, settings.device), Watch()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await engines.close()
        store.close()
        engines.reopen()  # an application may start again

    # FastAPI's pages of documentation would have browsers load scripts of other hosts: `/docs` is a page of ours.
    app = FastAPI(
        title="gradmem",
        version=__version__,
        description=ABOUT,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.store, app.state.engines, app.state.settings = store, engines, settings
    app.state.threads = Threads()
    app.add_middleware(Guard, settings=settings, keys=keys, watch=watch)
    http_errors.install(app)
    # The guard has seen the key; this says so in the OpenAPI document.
    bearer = Depends(HTTPBearer(auto_error=False, description="A key of `gradmem keys add`; not needed on loopback."))
    for router in (memories.router, checkpoints.router, openai.router):
        app.include_router(router, dependencies=[bearer], responses=http_errors.DOCUMENTED)

    @app.get("/healthz", tags=["operation"], responses=http_errors.DOCUMENTED)
    async def health() -> dict[str, str]:
        """Whether the server is there."""
        return {"status": "ok"}

    @app.get("/metrics", tags=["operation"], include_in_schema=False, dependencies=[bearer])
    async def metrics() -> Response:
        """Counts for Prometheus."""
        return Response(generate_latest(watch.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app.router.default = Page(directory=WEB, html=True)  # no mount, which would answer for paths of the API too
    return app


class Page(StaticFiles):
    """The files of the page, asked for anew each time: another version of gradmem has others."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer with the whole file: it is small, and a wrong range would have an answer of another form."""
        headers = [(name, value) for name, value in scope["headers"] if name != b"range"]
        await super().__call__({**scope, "headers": headers}, receive, send)

    async def get_response(self, path: str, scope: Any) -> Response:
        """Answer with a file; whoever wants more than to read one looks for something that is not there."""
        if scope["method"] not in ("GET", "HEAD"):
            raise HTTPException(404)
        return await super().get_response("docs.html" if path == "docs" else path, scope)

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        """Answer with a file, or say that the browser has it."""
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "no-cache"
        return response
