"""What every request passes first: who asks, from where, how much, how often and how long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any
from urllib.parse import urlsplit

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .api_keys import Keys
from .arrivals import Arrivals, Gone, too_large
from .engine import Closed
from .http_errors import Refused, problem
from .settings import Settings, is_loopback
from .telemetry import Watch

ARRIVAL = 30.0
"""Seconds in which a request must have arrived."""
BODIES = 8
"""Largest bodies that may be held at the same time."""
OWNED = ("/v1/", "/metrics")
"""Beginnings of the paths that need a key. The others, of the page and of operators, need none and read no body."""
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""What every answer tells browsers: a page runs and asks nothing but what this server serves, and is in no frame."""


class Sending:
    """Passes an answer on and remembers its status."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        """Send one message."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message).update(HEADERS)
        await self._send(message)


class Guard:
    """ASGI middleware: lets requests in, within the limits, and ends those whose client has left.

    Parameters
    ----------
    app : ASGI application
    settings : Settings
    keys : Keys
    watch : Watch
    """

    def __init__(self, app: ASGIApp, settings: Settings, keys: Keys, watch: Watch) -> None:
        self.app, self.settings, self.keys, self.watch = app, settings, keys, watch
        self.inside = 0
        self._arrivals = Arrivals(settings.max_requests, BODIES * settings.max_body)
        self._rate = RateLimitItemPerMinute(settings.rate)
        self._limiter = FixedWindowRateLimiter(MemoryStorage())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        sending = Sending(send)
        with self.watch.request(scope, sending):
            try:
                await self._serve(scope, receive, sending)
            except Gone:
                return
            except asyncio.CancelledError:  # the server ends before the request does
                if sending.status is not None:
                    raise
                await problem(Closed())(scope, receive, sending)
            except Exception as error:
                if sending.status is None:
                    await problem(error)(scope, receive, sending)
                if not isinstance(error, Refused | TimeoutError):
                    raise

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})["owner"] = self._admit(scope)
        ends = asyncio.get_running_loop().time() + self.settings.timeout
        if not scope["path"].startswith(OWNED):
            await self._run(scope, b"", receive, send, ends)
            return
        most = self.settings.max_body
        length = Headers(scope=scope).get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > most:
            raise too_large(most)
        async with self._arrivals.body(receive, most, min(ARRIVAL, self.settings.timeout)) as body:
            if self.inside >= self.settings.max_requests:
                raise Refused(429, f"{self.inside} requests are being served already", retry_after=1)
            self.inside += 1
            try:
                await self._run(scope, body, receive, send, ends)
            finally:
                self.inside -= 1

    # Who asks, and how often

    def _admit(self, scope: Scope) -> str | None:
        """The owner whose memories are served, or refuse."""
        headers = Headers(scope=scope)
        if self.settings.local:
            self._check_origin(headers)
        scheme, _, key = headers.get("authorization", "").partition(" ")
        key = key.strip() if scheme.lower() == "bearer" else ""
        owner = self.keys.owner(key) if key else None
        if scope["path"] != "/healthz":  # whoever looks after the server must not take it for dead in a flood
            self._check_rate(f"key {owner}" if owner else f"address {(scope.get('client') or ('',))[0]}")
        if owner is None and self._needs_key(scope["path"], key):
            raise Refused(401, "a key is needed: send the header `Authorization: Bearer KEY` with one of this server")
        return owner

    def _needs_key(self, path: str, key: str) -> bool:
        """On loopback none is, but a wrong one is refused: nobody should write where they do not expect it."""
        if self.settings.local:
            # OpenAI's clients cannot do without any; on loopback anything that is not one of ours is none.
            return key.startswith("gm-")
        return path.startswith(OWNED)

    def _check_origin(self, headers: Headers) -> None:
        """Refuse pages of other sites, whose names may be made to point to this machine (DNS rebinding)."""
        host = headers.get("host", "")
        if not is_loopback(_hostname(f"//{host}")):
            raise Refused(403, "this server answers to the names of this machine only: 127.0.0.1, ::1 or localhost")
        origin = headers.get("origin")
        if (origin is not None and origin != f"http://{host}") or headers.get("sec-fetch-site") == "cross-site":
            raise Refused(403, "pages of other sites may not use this server")

    def _check_rate(self, who: str) -> None:
        if not self._limiter.hit(self._rate, who):
            wait = self._limiter.get_window_stats(self._rate, who).reset_time - time.time()
            raise Refused(429, f"more than {self.settings.rate} requests in a minute", retry_after=wait)

    # How long

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send, ends: float) -> None:
        """Run the application until it is done, the client has left, or the time is over."""
        left = asyncio.ensure_future(_left(receive))
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            if waiting:
                return waiting.pop()
            await asyncio.wait({left})
            return {"type": "http.disconnect"}

        work: Coroutine[Any, Any, None] = self.app(scope, replay, send)  # type: ignore[assignment]
        task = asyncio.ensure_future(work)
        try:
            time_left = ends - asyncio.get_running_loop().time()
            await asyncio.wait({task, left}, timeout=time_left, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
            elif left.done():
                raise Gone
            else:
                raise TimeoutError
        finally:
            for one in (task, left):
                one.cancel()
            await asyncio.gather(task, left, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _hostname(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
