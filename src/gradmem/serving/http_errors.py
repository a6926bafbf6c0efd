"""Every refusal in one form: `{"error": {"message", "type"}}`, which OpenAI's clients read too."""

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
from .engine import Busy, Closed


class NotServed(GradmemError):
    """The checkpoint of a memory is not served."""


class Refused(Exception):
    """A request that is not let in.

    Attributes
    ----------
    status : int
    message : str
    retry_after : float or None
        Seconds.
    """

    def __init__(self, status: int, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after = status, message, retry_after


class Error(BaseModel):
    """What was wrong, in one line, and the kind of it."""

    message: str
    type: str


class Problem(BaseModel):
    """Body of every answer with a status from 400 on."""

    error: Error


DOCUMENTED: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": HTTPStatus(status).phrase}
    for status in (400, 401, 403, 404, 405, 408, 409, 413, 415, 422, 429, 503, 504)
}
"""What any path of the API may answer instead, for its OpenAPI document."""


def problem(error: BaseException) -> JSONResponse:
    """The answer to a request that failed; of what nobody foresaw it says nothing."""
    status, message, wait = _told(error)
    kind = HTTPStatus(status).phrase.lower().replace(" ", "_")
    headers = {} if wait is None else {"Retry-After": str(max(1, math.ceil(wait)))}
    if status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, HTTPException):
        headers |= error.headers or {}
    return JSONResponse({"error": {"message": message, "type": kind}}, status, headers)


def _told(error: BaseException) -> tuple[int, str, float | None]:
    """Status, message and seconds to wait. Messages of the store may name its place: those are not passed on."""
    if isinstance(error, Refused):
        return error.status, error.message, error.retry_after
    if isinstance(error, Busy):
        return 429, str(error), error.retry_after
    if isinstance(error, Closed | CancelledError):
        return 503, "the server is closing", 5
    if isinstance(error, Unavailable):
        return 503, "the store cannot be used at the moment", 5
    if isinstance(error, Missing):
        return 404, "no such memory, or no such version of it", None
    if isinstance(error, QuotaExceeded):
        return 403, _line(str(error)), None
    if isinstance(error, Conflict | NotServed):
        return 409, _line(str(error)), None
    if isinstance(error, GradmemError):
        return 422, _line(str(error)), None
    if isinstance(error, RequestValidationError):
        return 422, _line(_invalid(error)), None
    if isinstance(error, HTTPException):
        return error.status_code, _line(str(error.detail)), None
    if isinstance(error, TimeoutError):
        return 504, "the answer took longer than a request may", None
    return 500, "internal error: the server's log says where", None


def _line(message: str) -> str:
    return " ".join(message.split())[:1000]


def _invalid(error: RequestValidationError) -> str:
    """The first thing that is wrong, without what was sent."""
    first = error.errors()[0]
    places = [str(place) for place in first["loc"] if "[" not in str(place)]  # those with [ are types of ours
    return f"{'.'.join(places)}: {first['msg']}"


def install(app: FastAPI) -> None:
    """Answer every error of the app in this form; what nobody foresaw goes on to the guard, which logs it."""

    async def answer(_: Request, error: Exception) -> JSONResponse:
        return problem(error)

    for kind in (Refused, GradmemError, RequestValidationError, HTTPException, TimeoutError):
        app.add_exception_handler(kind, answer)
