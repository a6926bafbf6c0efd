"""Several replicas of the server on Ray Serve, behind one front.

The front is the server that clients reach: it checks keys, rates and sizes as a single server does, and passes each
request to a replica, which runs the same application. Requests for one memory go to one replica, by consistent hashing,
since that replica has its prefix.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import fields
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

from fastapi import FastAPI
from pydantic import BaseModel, Field
from ray import serve
from ray.exceptions import RayActorError, RayTaskError, TaskCancelledError, WorkerCrashedError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from ray.serve.schema import LoggingConfig
from starlette.types import Message, Receive, Scope, Send

from ..errors import GradmemError
from ..store import Store
from . import http_errors
from .api_keys import ApiKeys
from .app import unguarded_app
from .connections import SHUTDOWN_SECONDS
from .errors import Closed
from .guard import Guard, Response
from .http_errors import Refused, error_response
from .operation import Readiness, operation
from .rates import Rates
from .settings import Settings
from .telemetry import LOG, Telemetry, failure

ROUTER = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
SILENT = LoggingConfig(log_level="ERROR", enable_access_log=False)
PARSED = 2**20
"""Most bytes of a body in which the front looks for the name of a memory."""
SCOPE = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers")
"""What a replica is told of a request, besides its owner."""
LOST = (RayActorError, WorkerCrashedError, ReplicaUnavailableError)
"""Errors of a request whose replica has died."""


class Options(BaseModel, extra="forbid"):
    """What is served, and by how many replicas."""

    settings: Settings = Field(default_factory=Settings)
    store: str | None = Field(default_factory=lambda: os.environ.get("GRADMEM_STORE"))
    """Location, as in `Store`; by default that of this process, and not that of the cluster's."""
    max_memories: int = 10_000
    max_bytes: int = 2**30
    min_replicas: int = 1
    max_replicas: int = 4
    preload: bool = True
    """Whether a replica loads its checkpoints before it takes requests."""

    def open_store(self) -> Store:
        """Open the store.

        Raises
        ------
        GradmemError
            If there may be several replicas and the store is no server.
        """
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise GradmemError("--min_replicas must be at least 1, and --max_replicas at least as many")
        store = Store(self.store, max_memories=self.max_memories, max_bytes=self.max_bytes)
        if self.max_replicas > 1 and store.shared is None:
            store.close()
            raise GradmemError("several replicas need PostgreSQL: set GRADMEM_STORE to its URL, or --max_replicas to 1")
        return store


class Replica:
    """The application in a process of its own.

    Parameters
    ----------
    options : Options
    """

    async def __init__(self, options: Options) -> None:  # type: ignore[misc]  # as Ray Serve allows
        self.app = unguarded_app(options.open_store(), options.settings, Telemetry())
        for name in options.settings.checkpoints if options.preload else ():
            await self.app.state.engines.get(name)

    async def answer(self, scope: Scope, body: bytes) -> AsyncIterator[list[Message]]:
        """Serve a request that the front has admitted. Yield what is to be sent, as many messages as there are."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        task = asyncio.ensure_future(self._run(scope, body, messages))
        task.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            more = True
            while more:
                batch = [await messages.get()]
                while not messages.empty():
                    batch.append(messages.get_nowait())
                more = batch[-1] is not None
                yield [message for message in batch if message is not None]
        finally:
            task.cancel()  # the client has left, or the front has given up
            await asyncio.gather(task, return_exceptions=True)

    async def _run(self, scope: Scope, body: bytes, messages: asyncio.Queue[Message | None]) -> None:
        request = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            return request.pop() if request else await asyncio.Future()

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":  # the front counts requests by it
                message["route"] = getattr(scope.get("route"), "path", None)
            messages.put_nowait(message)

        response = Response(send)
        try:
            await self.app(scope, receive, response)
        except Exception as error:
            messages.put_nowait({"type": "failure", **failure(error)})
            if response.status is None:
                await error_response(error)(scope, receive, response)
            else:
                await response.end_stream(error)

    async def ready(self) -> None:
        """Raise an error if requests cannot be served."""
        await self.app.state.ready()

    def check_health(self) -> None:
        """Raise an error if this replica must be replaced. A store that is down is no reason."""
        self.app.state.engines.check()

    async def __del__(self) -> None:
        """Finish what was accepted, and end."""
        await self.app.state.engines.close(SHUTDOWN_SECONDS)
        self.app.state.store.close()


class Requests:
    """ASGI application that lets replicas answer.

    Parameters
    ----------
    replicas : DeploymentHandle
    """

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._answer = replicas.options(method_name="answer", stream=True)
        self._ready = replicas.options(method_name="ready")
        self._waiting: set[Any] = set()
        self._closed = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on one request, and its answer."""
        body = (await receive()).get("body", b"")
        told = {name: scope[name] for name in SCOPE if name in scope} | {"state": {"owner": scope["state"]["owner"]}}
        memory = memory_of(scope, body)
        handle = self._answer.options(session_id=f"{told['state']['owner'] or ''}/{memory}") if memory else self._answer
        answer: DeploymentResponseGenerator[list[Message]] = handle.remote(told, body)
        self._waiting.add(answer)
        try:
            async for messages in answer:
                for message in messages:
                    if message["type"] == "failure":
                        LOG.error("replica", extra={"fields": message})
                        continue
                    if path := message.pop("route", None):
                        scope["route"] = SimpleNamespace(path=path)
                    await send(message)
        except Exception as error:
            raise self._told(error) from error
        except asyncio.CancelledError:  # the client has left, or the time is over
            answer.cancel()
            raise
        finally:
            self._waiting.discard(answer)

    async def check(self) -> None:
        """Raise an error if no replica is ready."""
        if self._closed:
            raise Closed("the server is closed")
        try:
            await self._ready.remote()
        except Exception as error:
            raise self._told(error) from error

    async def close(self, grace: float | None = None) -> None:
        """Wait until the accepted requests are answered, and give up those that take longer than `grace` seconds."""
        self._closed = True
        until = asyncio.get_running_loop().time() + (math.inf if grace is None else grace)
        while self._waiting and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(0.05)
        for answer in self._waiting.copy():
            answer.cancel()

    def _told(self, error: Exception) -> Exception:
        """Say what the client is told of the error of a call."""
        cause = error.cause if isinstance(error, RayTaskError) else None
        if isinstance(cause, GradmemError | TimeoutError):
            return cause
        if self._closed and isinstance(error, TaskCancelledError):
            return Closed("the server is closed")
        if isinstance(error, LOST):
            return Refused(503, "the replica that had this request has stopped: send it again", retry_after=1)
        if isinstance(error, BackPressureError | DeploymentUnavailableError):
            return Refused(503, "no replica is ready at the moment", retry_after=5)
        return RuntimeError(type(error).__name__)


def memory_of(scope: Scope, body: bytes) -> str:
    """Return the id or name of the memory that a request is about, or nothing."""
    parts = [unquote(part) for part in scope["path"].split("/")]
    if parts[:3] == ["", "v1", "memories"] and len(parts) > 3:
        return parts[3] if scope["method"] != "POST" or len(parts) > 4 else ""
    if parts[:2] == ["", "v1"] and len(body) <= PARSED:
        with suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError):
            asked = json.loads(body)
            return str(asked.get("memory_id") or asked["model"].partition(":")[2])
    return ""


def front(replicas: DeploymentHandle, options: Options, keys: ApiKeys | None = None) -> FastAPI:
    """Build the application that clients reach.

    Parameters
    ----------
    replicas : DeploymentHandle
        See `deployment`.
    options : Options
    keys : ApiKeys, optional

    Raises
    ------
    GradmemError
        If other machines could reach it and there are no keys, or the store cannot be shared.
    """
    settings, keys, telemetry = options.settings, keys or ApiKeys(), Telemetry()
    settings.check_keys(keys)
    requests = Requests(replicas)
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.engines = requests
    app.add_middleware(
        Guard, settings=settings, keys=keys, telemetry=telemetry, rates=Rates(settings.rate, options.open_store())
    )
    http_errors.install(app)
    app.state.readiness = Readiness(requests.check)
    app.include_router(operation(telemetry, app.state.readiness))
    app.router.default = requests
    return app


def deployment(options: Options) -> serve.Application:
    """Describe the replicas: as many as the load needs, replaced one by one by new ones that are ready."""
    on_gpu = options.settings.device.startswith("cuda")
    described = serve.deployment(
        name="replica",
        ray_actor_options={"num_cpus": 1, "num_gpus": int(on_gpu)},
        max_ongoing_requests=options.settings.max_queue,
        max_queued_requests=options.settings.max_requests,
        max_constructor_retry_count=3,
        autoscaling_config=AutoscalingConfig(
            min_replicas=options.min_replicas,
            max_replicas=options.max_replicas,
            target_ongoing_requests=16,  # an engine answers those that wait together in one batch
        ),
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=SHUTDOWN_SECONDS + 5,
        max_surge_percent=1,  # one more than are needed, so that none is missed
        logging_config=SILENT,
    )
    return described(Replica).bind(options)


@serve.ingress()
class Front:
    """The front as a deployment, for clusters whose proxies take the requests."""

    def __init__(self, options: Options, replicas: DeploymentHandle) -> None:
        self._front = front(replicas, options)  # `app` is a name of the class that Ray Serve makes of this one

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._front


def app(arguments: dict[str, Any]) -> serve.Application:
    """Build the application of `serve run gradmem.serving.replicas:app`.

    Parameters
    ----------
    arguments : dict
        Fields of `Options` and of its `settings`, as text or as numbers; `checkpoints` may be separated by commas.
    """
    given = dict(arguments)
    if isinstance(named := given.get("checkpoints"), str):
        given["checkpoints"] = named.split(",")
    settings = {field.name: given.pop(field.name) for field in fields(Settings) if field.name in given}
    options = Options(settings=settings, **given)  # type: ignore[arg-type]
    described = serve.deployment(
        name="front",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=options.settings.max_requests,
        logging_config=SILENT,
    )
    return described(Front).bind(options, deployment(options))
