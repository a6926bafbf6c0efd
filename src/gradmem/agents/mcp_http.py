"""The MCP server over streamable HTTP, behind the guard of the HTTP API."""

from __future__ import annotations

from typing import Any

from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
from mcp.server.transport_security import TransportSecuritySettings
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..serving.api_keys import ApiKeys
from ..serving.guard import Guard
from ..serving.http_errors import Refused, error_response
from ..serving.rates import Rates
from ..serving.settings import Settings
from ..serving.telemetry import Telemetry
from ..serving.validation import check_json
from .mcp_server import MemoryServer
from .workspace import OWNER

PATH = "/mcp"


def http_app(server: MemoryServer, settings: Settings, keys: ApiKeys | None = None) -> Starlette:
    """Build the application.

    It has no sessions: each request brings its key, and nothing is kept for a client that has left.

    Parameters
    ----------
    server : MemoryServer
    settings : Settings
    keys : ApiKeys, optional

    Raises
    ------
    GradmemError
        If other machines could reach the server and there are no keys.
    """
    keys = keys or ApiKeys()
    settings.check_keys(keys)
    server.middleware.append(_as_owner)
    app = server.streamable_http_app(
        streamable_http_path=PATH,
        stateless_http=True,
        max_request_body_size=settings.max_body,
        transport_security=TransportSecuritySettings(enable_dns_rebinding_protection=False),  # the guard checks that
    )
    app.router.routes.insert(0, Route(PATH, _no_stream, methods=["GET", "DELETE"]))
    app.state.engines = server.workspace  # the process closes them when it ends
    app.state.readiness = None  # no proxy asks it
    app.add_middleware(JsonGuard)
    rates = Rates(settings.rate, server.workspace.store.store)
    # The last one is the outermost.
    app.add_middleware(Guard, settings=settings, keys=keys, telemetry=Telemetry(), rates=rates)
    return app


class JsonGuard:
    """ASGI middleware that checks JSON before it is parsed, since parsing blocks the event loop.

    Parameters
    ----------
    app : ASGI application
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, whose whole body the guard passes on as one message."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        messages = [await receive()]
        try:
            check_json(Headers(scope=scope).get("content-type", ""), messages[0].get("body", b""))
        except Refused as error:
            await error_response(error)(scope, receive, send)
            return

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self.app(scope, replay, send)


async def _no_stream(_: Request) -> Response:
    """Refuse to open a stream or to end a session, as the protocol wants it of a server that has none."""
    response = error_response(Refused(405, "this server has no sessions: send each message with POST"))
    response.headers["Allow"] = "POST"
    return response


async def _as_owner(ctx: ServerRequestContext[Any, Any], call_next: CallNext) -> HandlerResult:
    """Serve a request with the memories of the owner of its key, whom the guard has found."""
    request: Request = ctx.request  # type: ignore[assignment]
    token = OWNER.set(request.state.owner)
    try:
        return await call_next(ctx)
    finally:
        OWNER.reset(token)
