"""What a body may be: JSON of few values, and strings and lists of limited length."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from datetime import datetime
from typing import Annotated, Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import AfterValidator, Field

from ..store.database import utc
from .http_errors import Refused

MOST_OUTSIDE, MOST_QUOTES = 2**18, 2**15
"""Bytes of JSON outside of its strings, and quotation marks: what takes time to parse and to check."""
MOST_HEADER = 2**20
"""Bytes of a memory file's header, which is JSON."""
MOST_TAGS = 100


class JsonRoute(APIRoute):
    """A route that looks at JSON before it is parsed, which would hold up everybody."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler of requests."""
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def checked(request: Request) -> Response:
            check_json(request.headers.get("content-type", ""), await request.body())
            return await handle(request)

        return checked


def check_json(kind: str, body: bytes) -> None:
    """Refuse what is not said to be JSON, and JSON of more values than any request needs."""
    if not body:
        return
    kind = kind.partition(";")[0].strip().lower()
    if not kind.startswith("application/") or not kind.endswith(("/json", "+json")):
        given = f"not '{kind[:100]}'" if kind else "not one without that header"
        raise Refused(415, f"send JSON with the header `Content-Type: application/json`, {given}")
    # What is left in quotation marks is strings. All of this is fast, also for millions of values.
    parts = body.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"', MOST_QUOTES)
    if len(parts) > MOST_QUOTES or sum(map(len, parts[::2])) > MOST_OUTSIDE:
        raise Refused(413, "the JSON has more values than any request of this server needs")


def check_header(data: bytes) -> None:
    """Refuse a memory file with a header that would take long to parse."""
    if int.from_bytes(data[:8], "little") > MOST_HEADER:
        raise Refused(422, f"this is damaged or no memory file: its header has more than {MOST_HEADER:,} bytes")


def _whole(text: str) -> str:
    text.encode()  # JSON can escape half a character, which is no text; its ValueError is what pydantic reports
    return text


def _few(tags: str) -> str:
    if tags.count(",") >= MOST_TAGS:
        raise ValueError(f"at most {MOST_TAGS} tags")
    return tags


def _in_utc(moment: datetime) -> datetime:
    try:
        return utc(moment)
    except OverflowError as error:
        raise ValueError("no time of the years 1 to 9999 in UTC") from error


Text = Annotated[str, AfterValidator(_whole)]
"""As long as a request may be: how much of it a model takes, the model knows."""
Line = Annotated[str, Field(max_length=1000), AfterValidator(_whole)]
"""A name, an id, a cursor, a checkpoint."""
Query = Annotated[str, Field(max_length=2**16), AfterValidator(_whole)]
"""What is asked of a memory."""
Content = Annotated[str, Field(max_length=2**20), AfterValidator(_whole)]
"""A message of a conversation."""
Tags = Annotated[list[Line], Field(max_length=MOST_TAGS, fail_fast=True)]
TagLine = Annotated[str, Field(max_length=MOST_TAGS * 101), AfterValidator(_whole), AfterValidator(_few)]
"""Tags as a,b."""
Moment = Annotated[datetime, AfterValidator(_in_utc)]
