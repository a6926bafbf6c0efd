"""All errors in the one JSON form of OpenAI's API: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import math
from concurrent.futures import CancelledError
from http import HTTPStatus
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from ..errors import Conflict, GradmemError, Missing, QuotaExceeded, Unavailable
from .errors import Busy, Closed, NotServed, Stuck


class Refused(Exception):
    """The server refuses a request.

    Attributes
    ----------
    status : int
        HTTP status.
    message : str
    retry_after : float or None
        Seconds after which the client may try again.
    param : str or None
        The field of the request that is wrong, such as `messages[0].content`.
    code : str or None
        What is wrong, in one word for programs; by default what the status means.
    """

    def __init__(
        self,
        status: int,
        message: str,
        retry_after: float | None = None,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after, self.param = status, message, retry_after, param
        self.code = code or CODES.get(status) or HTTPStatus(status).phrase.lower().replace(" ", "_")

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the response."""
        kind = "server_error" if self.status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}
"""Codes that OpenAI's API has for a status; other errors have the phrase of their status."""


class Error(BaseModel):
    """What is wrong, in one line; whose mistake it is; the field of the request, if it is one; and a code."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """Body of every response with a status of 400 or above."""

    error: Error


ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": HTTPStatus(status).phrase}
    for status in (400, 401, 403, 404, 405, 408, 409, 413, 415, 422, 429, 502, 503, 504)
}
"""The errors that any path of the API may answer with, for the OpenAPI document."""


def error_response(error: BaseException) -> JSONResponse:
    """Build the response to a request that failed. It tells nothing about an unexpected error."""
    refused = refusal(error)
    headers = {} if refused.retry_after is None else {"Retry-After": str(max(1, math.ceil(refused.retry_after)))}
    if refused.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, HTTPException):
        headers |= error.headers or {}
    return JSONResponse(refused.body, refused.status, headers)


def refusal(error: BaseException) -> Refused:
    """Say how an error is answered. Messages of the store may hold its location: they stay here."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, Busy):
        return Refused(429, str(error), error.retry_after)
    if isinstance(error, Closed | CancelledError):
        return Refused(503, "the server is shutting down", 5)
    if isinstance(error, Stuck):
        return Refused(503, str(error), 5)
    if isinstance(error, Unavailable):
        return Refused(503, "the store cannot be used at the moment", 5)
    if isinstance(error, Missing):
        return Refused(404, "no such memory, or no such version of it")
    if isinstance(error, QuotaExceeded):
        return Refused(403, _one_line(str(error)))
    if isinstance(error, Conflict | NotServed):
        return Refused(409, _one_line(str(error)))
    if isinstance(error, GradmemError):
        return Refused(422, _one_line(str(error)), code="invalid_value")
    if isinstance(error, RequestValidationError):
        return _invalid(error)
    if isinstance(error, HTTPException):
        return Refused(error.status_code, _one_line(str(error.detail)))
    if isinstance(error, TimeoutError):
        return Refused(504, "the request took longer than the server's timeout")
    return Refused(500, "internal error: see the server's log")


def _one_line(message: str) -> str:
    return " ".join(message.split())[:1000]


UNSUPPORTED = "unsupported"
"""Kind of the error of a field that OpenAI's API has and this server cannot obey."""
KINDS: dict[str, tuple[str, str | None]] = {
    "missing": ("missing_required_parameter", "this field is needed"),
    "extra_forbidden": ("unknown_parameter", "no such field"),
    "literal_error": ("unsupported_value", None),
    UNSUPPORTED: ("unsupported_parameter", None),
}
"""Codes for kinds of errors that pydantic names, and messages that are better than its own."""


def _invalid(error: RequestValidationError) -> Refused:
    """Name the first invalid field, without its value."""
    first = error.errors()[0]
    kind, place = first["type"], first["loc"][1:]  # without its beginning, such as `body`
    code, message = KINDS.get(kind, ("invalid_value", None))
    message = message or first["msg"]
    if kind == "json_invalid":
        return Refused(422, f"the body is no JSON: {_one_line(str(first['ctx']['error']))}", code="invalid_json")
    names = [name for name in place if "[" not in str(name)]  # those with [ are names of types
    field = "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in names).removeprefix(".")
    return Refused(
        422, _one_line(f"{field}: {message}" if field else message), param=_one_line(field) or None, code=code
    )


def install(app: FastAPI) -> None:
    """Answer all errors of the app in this form. Unexpected errors are left to the guard, which logs them."""

    async def answer(_: Request, error: Exception) -> JSONResponse:
        return error_response(error)

    for kind in (Refused, GradmemError, RequestValidationError, HTTPException, TimeoutError):
        app.add_exception_handler(kind, answer)
