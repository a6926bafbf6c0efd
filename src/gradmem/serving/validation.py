"""What requests may hold: JSON of limited size, and strings and lists of limited length."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from datetime import datetime
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import AfterValidator, Field

from ..errors import GradmemError, Missing
from ..store.database import utc
from .http_errors import Refused, refusal

MAX_STRUCTURE_BYTES, MAX_QUOTES = 2**18, 2**15
"""Most bytes of JSON outside its strings, and most quotation marks: these cost time to parse and to validate."""
MAX_HEADER_BYTES = 2**20
"""Most bytes of a memory file's header, which is JSON."""
MAX_TAGS = 100
TENSORS = b"prompt_embeds"
"""A field of vLLM's API that carries a tensor, which can harm the server that loads it (CVE-2025-62164)."""


class JsonRoute(APIRoute):
    """A route that checks JSON before it is parsed, since parsing blocks the event loop."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler of requests."""
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def checked(request: Request) -> Response:
            check_json(request.headers.get("content-type", ""), await request.body())
            return await handle(request)

        return checked


class OpenAIRoute(JsonRoute):
    """A route of OpenAI's API, which answers 400 where the other routes answer 422."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler of requests."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except Missing as error:
                raise Refused(404, refusal(error).message, param="model", code="model_not_found") from error
            except (GradmemError, RequestValidationError) as error:
                refused = refusal(error)
                if refused.status != HTTPStatus.UNPROCESSABLE_ENTITY:
                    raise
                raise Refused(400, refused.message, param=refused.param, code=refused.code) from error

        return answer


def check_json(content_type: str, body: bytes) -> None:
    """Refuse a body that is not declared as JSON, or has more values than any request needs."""
    if not body:
        return
    media_type = content_type.partition(";")[0].strip().lower()
    if not media_type.startswith("application/") or not media_type.endswith(("/json", "+json")):
        given = f"not '{media_type[:100]}'" if media_type else "but the header is missing"
        raise Refused(415, f"send JSON with the header `Content-Type: application/json`, {given}")
    # Without its escapes, every second part between quotation marks is a string. This is fast for any body.
    parts = body.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"', MAX_QUOTES)
    if len(parts) > MAX_QUOTES or sum(map(len, parts[::2])) > MAX_STRUCTURE_BYTES:
        raise Refused(413, "the JSON has more values than any request of this server needs")
    if any(
        one == TENSORS and then.lstrip().startswith(b":") for one, then in zip(parts[1::2], parts[2::2], strict=False)
    ):
        message = f"{TENSORS.decode()}: this server takes no tensors, and makes those of memories itself"
        raise Refused(400, message, param=TENSORS.decode(), code="unsupported_parameter")


def check_header(data: bytes) -> None:
    """Refuse a memory file whose header is so large that it would take long to parse."""
    if int.from_bytes(data[:8], "little") > MAX_HEADER_BYTES:
        raise Refused(422, f"this is damaged or no memory file: its header has more than {MAX_HEADER_BYTES:,} bytes")


def _valid_unicode(text: str) -> str:
    text.encode()  # JSON can escape half a character; pydantic reports the ValueError
    return text


def _few_tags(tags: str) -> str:
    if tags.count(",") >= MAX_TAGS:
        raise ValueError(f"at most {MAX_TAGS} tags")
    return tags


def _in_utc(moment: datetime) -> datetime:
    try:
        return utc(moment)
    except OverflowError as error:
        raise ValueError("the time must be in the years 1 to 9999 in UTC") from error


Text = Annotated[str, AfterValidator(_valid_unicode)]
"""A text to write. The model limits its length."""
Line = Annotated[str, Field(max_length=1000), AfterValidator(_valid_unicode)]
"""A name, an id, a cursor or a checkpoint."""
Query = Annotated[str, Field(max_length=2**16), AfterValidator(_valid_unicode)]
"""A query to a memory."""
Content = Annotated[str, Field(max_length=2**20), AfterValidator(_valid_unicode)]
"""A message of a conversation."""
Stop = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_valid_unicode)]
"""A text that ends an answer."""
Tags = Annotated[list[Line], Field(max_length=MAX_TAGS, fail_fast=True)]
"""A list of tags."""
TagLine = Annotated[str, Field(max_length=MAX_TAGS * 101), AfterValidator(_valid_unicode), AfterValidator(_few_tags)]
"""Tags separated by commas."""
Moment = Annotated[datetime, AfterValidator(_in_utc)]
"""A time, in UTC where it has no time zone."""
