"""What an operator sees of a server: metrics and logs, neither of which holds a text, a query, an answer or a name."""

from __future__ import annotations

import json
import logging
import secrets
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

LOG = logging.getLogger("gradmem.serving")


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Only what was meant for the log: messages of exceptions may quote what was sent."""
        about: dict[str, Any] = {"time": round(record.created, 3), "level": record.levelname.lower()}
        about |= {"event": record.getMessage(), **getattr(record, "fields", {})}
        if record.exc_info and record.exc_info[1]:
            about |= failure(record.exc_info[1])
        return json.dumps(about)


def failure(error: BaseException) -> dict[str, Any]:
    """Kind and places of an exception, without its message."""
    places = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    return {"error": type(error).__name__, "places": places}


class Watch:
    """Counts and logs of requests, by the path's template.

    Attributes
    ----------
    registry : CollectorRegistry
        The metrics.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.done = Counter("gradmem_requests", "Requests", ["method", "path", "status"], registry=self.registry)
        self.seconds = Histogram("gradmem_request_seconds", "Seconds of requests", ["path"], registry=self.registry)
        self.inside = Gauge("gradmem_requests_inside", "Requests being served", registry=self.registry)

    @contextmanager
    def request(self, scope: Any, sent: Any) -> Iterator[None]:
        """Count and log one request; `sent.status` is the status that it is answered with, None without answer."""
        started = time.monotonic()
        about: dict[str, Any] = {"request": secrets.token_hex(8), "method": _method(scope)}
        try:
            with self.inside.track_inprogress():
                yield
        except Exception as error:
            about |= failure(error)
        finally:
            # 499: the client left before there was an answer, in the words of nginx.
            about |= {"path": getattr(scope.get("route"), "path", "other"), "status": sent.status or 499}
            seconds = time.monotonic() - started
            self.done.labels(about["method"], about["path"], about["status"]).inc()
            self.seconds.labels(about["path"]).observe(seconds)
            level = logging.ERROR if "error" in about else logging.INFO
            LOG.log(level, "request", extra={"fields": {**about, "ms": round(1000 * seconds, 1)}})


def _method(scope: Any) -> str:
    known = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
    return scope["method"] if scope["method"] in known else "other"
