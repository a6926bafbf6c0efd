"""The HTTP API as one ASGI application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Response
from fastapi.staticfiles import StaticFiles

from ..store import Store
from . import http_errors
from .api_keys import ApiKeys
from .async_store import AsyncStore, StoreThreads
from .engine_pool import EnginePool
from .guard import Guard
from .operation import BEARER, Readiness, operation
from .rates import Rates
from .routes import ROUTERS
from .settings import Settings
from .telemetry import Telemetry

WEB = Path(__file__).parent / "web"
"""The web page: every file in this folder is served under `/`."""
DESCRIPTION = "Memory for language models: written once, asked many times."


def create_app(store: Store, settings: Settings | None = None, keys: ApiKeys | None = None) -> FastAPI:
    """Build the application behind its guard.

    Parameters
    ----------
    store : Store
        Closed when the application ends.
    settings : Settings, optional
    keys : ApiKeys, optional

    Raises
    ------
    GradmemError
        If other machines could reach the server and there are no keys.
    """
    settings, keys, telemetry = settings or Settings(), keys or ApiKeys(), Telemetry()
    settings.check_keys(keys)
    app = unguarded_app(store, settings, telemetry)
    rates = Rates(settings.rate, store)
    app.add_middleware(Guard, settings=settings, keys=keys, telemetry=telemetry, rates=rates)
    return app


def unguarded_app(store: Store, settings: Settings, telemetry: Telemetry) -> FastAPI:
    """Build the application without its guard, which has to name the owner of each request."""
    engines = EnginePool(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await engines.close()
        store.close()
        engines.reopen()  # an application may be started again

    # FastAPI's own pages of documentation load scripts from other hosts; `/docs` is a page of this package.
    app = FastAPI(
        title="gradmem",
        version=version("gradmem"),
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.store, app.state.engines, app.state.settings = store, engines, settings
    app.state.threads = StoreThreads()
    http_errors.install(app)
    for router in ROUTERS:
        app.include_router(router, dependencies=[BEARER], responses=http_errors.ERROR_RESPONSES)
    app.state.ready = partial(check_ready, app)
    app.state.readiness = Readiness(app.state.ready)
    app.include_router(operation(telemetry, app.state.readiness))
    app.router.default = Page(directory=WEB, html=True)  # a mount would also answer for unknown paths of the API
    return app


async def check_ready(app: FastAPI) -> None:
    """Raise an error if an application cannot serve requests."""
    app.state.engines.check()
    await AsyncStore(app.state.store, app.state.threads).read(lambda store: store.list(limit=1))


class Page(StaticFiles):
    """The files of the web page. Browsers revalidate them each time, since another version of gradmem has others."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer with the whole file, whatever range is asked for: the files are small."""
        headers = [(name, value) for name, value in scope["headers"] if name != b"range"]
        await super().__call__({**scope, "headers": headers}, receive, send)

    async def get_response(self, path: str, scope: Any) -> Response:
        """Answer with a file. Any method but GET or HEAD gets 404."""
        if scope["method"] not in ("GET", "HEAD"):
            raise HTTPException(404)
        return await super().get_response("docs.html" if path == "docs" else path, scope)

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        """Answer with a file, or with 304 if the browser has it."""
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "no-cache"
        return response
