"""Metrics and logs for the operator. Neither holds a text, a query, an answer or a name."""

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
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class JsonLines(logging.Formatter):
    """Formats each log record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Format the event and its fields. Messages of exceptions are left out: they may quote a request."""
        fields: dict[str, Any] = {"time": round(record.created, 3), "level": record.levelname.lower()}
        fields |= {"event": record.getMessage(), **getattr(record, "fields", {})}
        if record.exc_info and record.exc_info[1]:
            fields |= failure(record.exc_info[1])
        return json.dumps(fields)


def failure(error: BaseException) -> dict[str, Any]:
    """Return the type and the stack of an exception, without its message."""
    stack = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    return {"error": type(error).__name__, "stack": stack}


class Telemetry:
    """Counts and logs requests by the template of their path.

    Attributes
    ----------
    registry : CollectorRegistry
        The metrics, for Prometheus.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("gradmem_requests", "Requests", ["method", "path", "status"], registry=self.registry)
        self.seconds = Histogram("gradmem_request_seconds", "Seconds of requests", ["path"], registry=self.registry)
        self.active = Gauge("gradmem_requests_active", "Requests that are being served", registry=self.registry)

    @contextmanager
    def request(self, scope: Any, response: Any) -> Iterator[None]:
        """Count and log one request. `response.status` is the status that was sent, or None if none was."""
        started = time.monotonic()
        fields: dict[str, Any] = {
            "request": secrets.token_hex(8),
            "method": scope["method"] if scope["method"] in METHODS else "other",
        }
        try:
            with self.active.track_inprogress():
                yield
        except Exception as error:
            fields |= failure(error)
        finally:
            # 499 is nginx's status for a client that disconnected before it was answered.
            fields |= {"path": getattr(scope.get("route"), "path", "other"), "status": response.status or 499}
            seconds = time.monotonic() - started
            self.requests.labels(fields["method"], fields["path"], fields["status"]).inc()
            self.seconds.labels(fields["path"]).observe(seconds)
            level = logging.ERROR if "error" in fields else logging.INFO
            LOG.log(level, "request", extra={"fields": {**fields, "ms": round(1000 * seconds, 1)}})
