"""All errors in one JSON form, `{"error": {"message", "type"}}`, which OpenAI's clients understand too."""

from __future__ import annotations

import math
from concurrent.futures import CancelledError
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from ..errors import Conflict, GradmemError, Missing, QuotaExceeded, Unavailable
from .errors import Busy, Closed, NotServed


class Refused(Exception):
    """The server refuses a request.

    Attributes
    ----------
    status : int
        HTTP status.
    message : str
    retry_after : float or None
        Seconds after which the client may try again.
    """

    def __init__(self, status: int, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after = status, message, retry_after


class Error(BaseModel):
    """What is wrong, in one line, and the kind of error."""

    message: str
    type: str


class ErrorBody(BaseModel):
    """Body of every response with a status of 400 or above."""

    error: Error


ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": HTTPStatus(status).phrase}
    for status in (400, 401, 403, 404, 405, 408, 409, 413, 415, 422, 429, 503, 504)
}
"""The errors that any path of the API may answer with, for the OpenAPI document."""


def error_response(error: BaseException) -> JSONResponse:
    """Build the response to a request that failed. It tells nothing about an unexpected error."""
    status, message, wait = _describe(error)
    kind = HTTPStatus(status).phrase.lower().replace(" ", "_")
    headers = {} if wait is None else {"Retry-After": str(max(1, math.ceil(wait)))}
    if status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, HTTPException):
        headers |= error.headers or {}
    return JSONResponse({"error": {"message": message, "type": kind}}, status, headers)


def _describe(error: BaseException) -> tuple[int, str, float | None]:
    """Return status, message and seconds to wait. Messages of the store may hold its location: they stay here."""
    if isinstance(error, Refused):
        return error.status, error.message, error.retry_after
    if isinstance(error, Busy):
        return 429, str(error), error.retry_after
    if isinstance(error, Closed | CancelledError):
        return 503, "the server is shutting down", 5
    if isinstance(error, Unavailable):
        return 503, "the store cannot be used at the moment", 5
    if isinstance(error, Missing):
        return 404, "no such memory, or no such version of it", None
    if isinstance(error, QuotaExceeded):
        return 403, _one_line(str(error)), None
    if isinstance(error, Conflict | NotServed):
        return 409, _one_line(str(error)), None
    if isinstance(error, GradmemError):
        return 422, _one_line(str(error)), None
    if isinstance(error, RequestValidationError):
        return 422, _one_line(_first_invalid(error)), None
    if isinstance(error, HTTPException):
        return error.status_code, _one_line(str(error.detail)), None
    if isinstance(error, TimeoutError):
        return 504, "the request took longer than the server's timeout", None
    return 500, "internal error: see the server's log", None


def _one_line(message: str) -> str:
    return " ".join(message.split())[:1000]


def _first_invalid(error: RequestValidationError) -> str:
    """Name the first invalid field, without its value."""
    first = error.errors()[0]
    fields = [str(field) for field in first["loc"] if "[" not in str(field)]  # those with [ are names of our types
    return f"{'.'.join(fields)}: {first['msg']}"


def install(app: FastAPI) -> None:
    """Answer all errors of the app in this form. Unexpected errors are left to the guard, which logs them."""

    async def answer(_: Request, error: Exception) -> JSONResponse:
        return error_response(error)

    for kind in (Refused, GradmemError, RequestValidationError, HTTPException, TimeoutError):
        app.add_exception_handler(kind, answer)
