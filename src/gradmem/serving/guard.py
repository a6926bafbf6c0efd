"""Middleware that every request passes first: keys, origins, limits of rate and size, and timeouts."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .api_keys import ApiKeys
from .body_reader import BodyReader, body_too_large
from .errors import ClientDisconnected, Closed
from .http_errors import Refused, error_response, refusal
from .rates import Rates
from .settings import Settings, is_loopback
from .streaming import EVENT_STREAM, server_sent_event
from .telemetry import Telemetry

BODY_SECONDS = 30.0
"""Most seconds in which the body of a request must arrive."""
BODIES = 8
"""Bodies of the largest size that may be in memory at the same time."""
KEY_PATHS = ("/v1/", "/metrics", "/mcp")
"""Paths that need a key begin with these. All others, such as the page and `/healthz`, need none and read no body."""
CHECKS = ("/healthz", "/readyz")
"""Paths whose requests are not counted: checks must succeed in a flood of requests too."""
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""Headers of every response: the page loads only what this server serves, and no other site can frame it."""


class Response:
    """Sends a response with the security headers, and remembers its status and whether it has ended."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None
        self._streams = self._ended = False

    async def __call__(self, message: Message) -> None:
        """Send one message."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers.update(SECURITY_HEADERS)
            self._streams = headers.get("content-type", "").startswith(EVENT_STREAM)
        self._ended = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)

    async def end_stream(self, error: Exception) -> None:
        """End a stream of events that is not finished. A client learns of what nobody else could tell, as a timeout."""
        if self._streams and not self._ended:
            told = isinstance(error, Refused | TimeoutError)
            event = server_sent_event("error", refusal(error).body) if told else ""
            await self({"type": "http.response.body", "body": event.encode(), "more_body": False})


class Guard:
    """ASGI middleware that admits requests within the limits, and cancels those whose client has disconnected.

    Parameters
    ----------
    app : ASGI application
    settings : Settings
    keys : ApiKeys
    telemetry : Telemetry
    rates : Rates
    """

    def __init__(self, app: ASGIApp, settings: Settings, keys: ApiKeys, telemetry: Telemetry, rates: Rates) -> None:
        self.app, self.settings, self.keys, self.telemetry, self.rates = app, settings, keys, telemetry, rates
        self.active = 0
        self._bodies = BodyReader(settings.max_requests, BODIES * settings.max_body)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        response = Response(send)
        with self.telemetry.request(scope, response):
            try:
                await self._serve(scope, receive, response)
            except ClientDisconnected:
                return
            except asyncio.CancelledError:  # the server shuts down before the request is answered
                if response.status is not None:
                    raise
                await error_response(Closed())(scope, receive, response)
            except Exception as error:
                if response.status is None:
                    await error_response(error)(scope, receive, response)
                else:
                    await response.end_stream(error)
                if not isinstance(error, Refused | TimeoutError):
                    raise

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})["owner"] = await self._admit(scope)
        deadline = asyncio.get_running_loop().time() + self.settings.timeout
        if not scope["path"].startswith(KEY_PATHS):
            await self._run(scope, b"", receive, send, deadline)
            return
        max_body = self.settings.max_body
        length = Headers(scope=scope).get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > max_body:
            raise body_too_large(max_body)
        async with self._bodies.body(receive, max_body, min(BODY_SECONDS, self.settings.timeout)) as body:
            if self.active >= self.settings.max_requests:
                raise Refused(429, f"{self.active} requests are being served already", retry_after=1)
            self.active += 1
            try:
                await self._run(scope, body, receive, send, deadline)
            finally:
                self.active -= 1

    # Keys, origins and rates

    async def _admit(self, scope: Scope) -> str | None:
        """Return the owner whose memories are served, or refuse the request."""
        headers = Headers(scope=scope)
        if self.settings.local:
            self._check_origin(headers)
        scheme, _, key = headers.get("authorization", "").partition(" ")
        key = key.strip() if scheme.lower() == "bearer" else ""
        owner = self.keys.owner(key) if key else None
        if scope["path"] not in CHECKS:
            await self.rates.check(f"key {owner}" if owner else f"address {(scope.get('client') or ('',))[0]}")
        if owner is None and self._needs_key(scope["path"], key):
            raise Refused(401, "a key is needed: send the header `Authorization: Bearer KEY` with one of this server")
        return owner

    def _needs_key(self, path: str, key: str) -> bool:
        """On loopback no key is needed. A wrong key is refused, since the memory would get another owner."""
        if self.settings.local:
            # OpenAI's clients always send a key: on loopback only those that look like ours are checked.
            return key.startswith("gm-")
        return path.startswith(KEY_PATHS)

    def _check_origin(self, headers: Headers) -> None:
        """Refuse pages of other sites, also those whose name resolves to this machine (DNS rebinding)."""
        host = headers.get("host", "")
        if not is_loopback(_hostname(f"//{host}")):
            raise Refused(403, "use one of this machine's own names: 127.0.0.1, ::1 or localhost")
        origin = headers.get("origin")
        if (origin is not None and origin != f"http://{host}") or headers.get("sec-fetch-site") == "cross-site":
            raise Refused(403, "pages of other sites may not use this server")

    # Timeouts

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send, deadline: float) -> None:
        """Run the application until it is done, the client has disconnected, or the deadline has passed."""
        disconnected = asyncio.ensure_future(_wait_for_disconnect(receive))
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            if messages:
                return messages.pop()
            await asyncio.wait({disconnected})
            return {"type": "http.disconnect"}

        work: Coroutine[Any, Any, None] = self.app(scope, replay, send)  # type: ignore[assignment]
        task = asyncio.ensure_future(work)
        try:
            seconds = deadline - asyncio.get_running_loop().time()
            await asyncio.wait({task, disconnected}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
            elif disconnected.done():
                raise ClientDisconnected
            else:
                raise TimeoutError
        finally:
            for one in (task, disconnected):
                one.cancel()
            await asyncio.gather(task, disconnected, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _hostname(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
