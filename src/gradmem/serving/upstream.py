"""An engine whose queries another server answers: vLLM, or one that takes prompt embeddings as vLLM does."""

from __future__ import annotations

import asyncio
import json
import math
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Hashable
from concurrent.futures import Future, wait
from contextlib import aclosing, asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx2

from ..errors import GradmemError
from ..exports.prompt_embeds import embedded, has_vectors, to_base64
from ..model import Answer, BoundMemory, MemoryModel
from ..sampling import MIN_TEMPERATURE, Sampling, Token
from ..tasks.base import Conversation, Task
from .answer_control import GrowingAnswer
from .engine import Engine
from .engine_requests import AskRequest, OnText, OnToken
from .errors import Busy, Closed
from .http_errors import Refused
from .telemetry import LOG

KEY = "GRADMEM_UPSTREAM_KEY"
"""Environment variable with the API key of the upstream server."""
CONNECT_SECONDS = 5.0
PAUSES = (0.1, 0.5)
"""Seconds before another attempt to reach the upstream server. Nothing is repeated once it has begun to answer."""
EVIDENCE = 2
"""Log-probabilities of this many tokens at each place are asked for: the margin needs two."""
Measured = tuple[int, float, list[tuple[int, float]]]
"""Id and log-probability of a token, and ids and log-probabilities of the likeliest tokens at its place."""
NO_VECTORS = (
    "the upstream server takes memories of vectors only (gradmem, cram, rmt, vectors), and this memory is of another "
    "kind: ask it without --upstream"
)


class UpstreamEngine(Engine):
    """Writes memories itself, and lets another server answer queries from them.

    The other server runs the language model of this engine's model. It is sent prompt embeddings (memory and query in
    one tensor) that are made here, and nothing that a client sent.

    Parameters
    ----------
    model : MemoryModel
        Only the engine may use it from now on.
    url : str
        Base URL of the other server's API, such as http://127.0.0.1:8001/v1. The environment variable
        GRADMEM_UPSTREAM_KEY has its API key, if it needs one.
    max_queue : int
        Most texts that wait to be written, and most queries that wait for the other server.
    timeout : float
        Most seconds in which the other server may send nothing.

    Raises
    ------
    GradmemError
        If the URL is not one of HTTP.
    """

    def __init__(self, model: MemoryModel, url: str, *, max_queue: int, timeout: float) -> None:
        super().__init__(model, max_queue=max_queue)
        key = os.environ.get(KEY)
        self._http = httpx2.AsyncClient(
            base_url=checked_url(url),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS)),
            limits=httpx2.Limits(max_connections=None),  # `max_queue` limits them
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asked: set[Future[Answer]] = set()

    def ask(
        self,
        key: Hashable,
        memory: BoundMemory,
        query: str | Conversation,
        *,
        timeout: float | None = None,
        sampling: Sampling | None = None,
        on_text: OnText | None = None,
        on_token: OnToken | None = None,
    ) -> Future[Answer]:
        """Let the upstream server answer a query; see `Engine.ask`. It is called, and calls back, on an event loop."""
        if not has_vectors(memory.model.method):
            raise GradmemError(NO_VECTORS)
        if self._closed:
            raise Closed("the engine is closed")
        if len(self._asked) >= self.max_queue:
            raise Busy(f"{len(self._asked)} requests are waiting already: try again in 1 s", 1.0)
        request = AskRequest(key, memory, query, sampling or Sampling(), on_text, on_token, math.inf)
        self._loop = asyncio.get_running_loop()
        future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(self._answer(request), timeout), self._loop)
        self._asked.add(future)
        future.add_done_callback(self._asked.discard)
        return future

    def write(self, *text: Any, **options: Any) -> Future[BoundMemory]:
        """Queue a text to be written; see `Engine.write`. A method whose memories cannot be asked is refused."""
        if not has_vectors(self.model.method):
            raise GradmemError(
                f"the upstream server takes memories of vectors only, and '{self.model.name}' writes others here: "
                "write with `gradmem write --method vectors --store`, or serve a trained checkpoint"
            )
        return super().write(*text, **options)

    def close(self, grace: float | None = None) -> None:
        """Finish what was accepted; see `Engine.close`. Queries that are not answered in time are cancelled."""
        started = time.monotonic()
        super().close(grace)
        rest = None if grace is None else max(0.0, started + grace - time.monotonic())
        for late in wait(self._asked.copy(), rest).not_done:
            late.cancel()
        if self._loop is not None and self._loop.is_running():
            asyncio.run_coroutine_threadsafe(self._http.aclose(), self._loop)

    async def _answer(self, request: AskRequest) -> Answer:
        task, body = request.memory.model.task, await asyncio.to_thread(_body, request)
        answer, logprobs, margin = GrowingAnswer(request, task), list[float](), 0.0
        async with aclosing(self._choices(body)) as choices:
            async for choice in choices:
                for token, logprob, likeliest in _tokens(choice):
                    if not logprobs:
                        margin = likeliest[0][1] - likeliest[1][1]
                    logprobs.append(logprob)
                    answer.take(token, _named(task, request.sampling, token, logprob, likeliest))
                    if answer.ended:
                        break
                if answer.ended:
                    break
        if not logprobs:
            raise Refused(502, "the upstream server ended the answer before its first token")
        whole = task.decode(answer.ids)
        text = request.sampling.cut(whole)
        return Answer(
            text,
            sum(logprobs) / len(logprobs),
            min(logprobs),
            margin,
            near_loss=None,
            finish_reason="stop" if answer.ids[-1] in task.end_ids or text != whole else "length",
            query_tokens=len(request.ids),
            answer_tokens=len(answer.ids),
        )

    async def _choices(self, body: bytes) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the parts of an answer as they arrive, until it is complete."""
        async with self._response(body) as response:
            try:
                async for line in response.aiter_lines():
                    if not line.startswith("data:") or (data := line[5:].strip()) == "[DONE]":
                        continue
                    event = json.loads(data)
                    if "error" in event:
                        raise Refused(502, "the upstream server failed while it answered")
                    for choice in event["choices"]:
                        yield choice
                        if choice.get("finish_reason"):
                            return
            except httpx2.TimeoutException as error:
                raise Refused(504, "the upstream server stopped in the middle of its answer") from error
            except httpx2.TransportError as error:
                raise Refused(502, "the upstream server broke off its answer") from error
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise _unreadable() from error
        raise Refused(502, "the upstream server broke off its answer")

    @asynccontextmanager
    async def _response(self, body: bytes) -> AsyncIterator[httpx2.Response]:
        """Send a request, again if no answer begins because of the connection, and check the status."""
        request = self._http.build_request(
            "POST", "completions", content=body, headers={"Content-Type": "application/json"}
        )
        for pause in (*PAUSES, None):
            try:
                response = await self._http.send(request, stream=True)
                break
            except (httpx2.ReadTimeout, httpx2.WriteTimeout) as error:
                raise Refused(504, "the upstream server did not answer in time") from error
            except httpx2.TransportError as error:
                LOG.warning("upstream", extra={"fields": {"error": type(error).__name__}})
                if pause is None:
                    raise Refused(503, "the upstream server cannot be reached", 5) from error
                await asyncio.sleep(pause)
        try:
            if not response.is_success:
                LOG.warning("upstream", extra={"fields": {"status": response.status_code}})
                raise await _refusal(response)
            yield response
        finally:
            await response.aclose()


def checked_url(url: str) -> str:
    """Return a base URL that ends in a slash.

    Raises
    ------
    GradmemError
        If it is not one of HTTP.
    """
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise GradmemError(f"--upstream must be the base URL of an API, such as http://127.0.0.1:8001/v1, not '{url}'")
    return url.rstrip("/") + "/"


def _body(request: AskRequest) -> bytes:
    """Tokenize a query, and build the body of the request to the upstream server.

    The generation config of the model there is overridden: an answer ends where those of the task end.

    Raises
    ------
    GradmemError
        If something is wrong with the query or the memory.
    """
    sampling, task = request.sampling, request.memory.model.task
    if not request.start():
        request.future.result()
    embeds = embedded(request.memory, request.ids)
    if not request.fits(len(embeds) - len(request.ids)):
        request.future.result()
    body = {
        "prompt_embeds": to_base64(embeds),
        "max_tokens": request.most_tokens,
        "temperature": sampling.temperature if sampling.temperature >= MIN_TEMPERATURE else 0.0,
        "top_p": sampling.top_p,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "logit_bias": dict(sampling.logit_bias) or None,
        "seed": sampling.seed,
        "ignore_eos": True,  # the ends of the task's answers are these:
        "stop_token_ids": task.end_ids,
        "logprobs": max(EVIDENCE, sampling.top_logprobs or 0),
        "return_tokens_as_token_ids": True,  # two tokens may have the same text
        "return_token_ids": True,
        "stream": True,
    }
    return json.dumps(body).encode()


def _tokens(choice: dict[str, Any]) -> list[Measured]:
    """The new tokens of an answer: their ids and log-probabilities, and those of the likeliest tokens there."""
    try:
        ids = choice.get("token_ids") or ()
        if not ids:
            if choice.get("text"):
                raise Refused(502, "the upstream server sends no token ids: take a vLLM that knows `return_token_ids`")
            return []
        found = choice["logprobs"]
        new = list(zip(ids, found["token_logprobs"], map(_ranked, found["top_logprobs"]), strict=True))
        if not all(isinstance(one, int) and isinstance(own, float) and len(others) > 1 for one, own, others in new):
            raise _unreadable()
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _unreadable() from error
    return new


def _ranked(likeliest: dict[str, float]) -> list[tuple[int, float]]:
    """Ids and log-probabilities, the likeliest first, of tokens that are named `token_id:ID`."""
    found = [(int(name.rpartition(":")[2]), float(logprob)) for name, logprob in likeliest.items()]
    return sorted(found, key=lambda one: -one[1])


def _named(
    task: Task, sampling: Sampling, token: int, logprob: float, likeliest: list[tuple[int, float]]
) -> Token | None:
    """A token for those who listen, if the request asks for log-probabilities."""
    if sampling.top_logprobs is None:
        return None
    return Token(
        task.text([token]), logprob, [(task.text([one]), own) for one, own in likeliest[: sampling.top_logprobs]]
    )


def _unreadable() -> Refused:
    return Refused(502, "the answer of the upstream server cannot be read: it must be vLLM's")


async def _refusal(response: httpx2.Response) -> Refused:
    """What a client is told of an error of the upstream server. Only what concerns the request is quoted."""
    status = response.status_code
    if status in (429, 503):
        after = response.headers.get("Retry-After", "")
        return Refused(503, "the upstream server is busy", float(after) if after.isdecimal() else 1.0)
    if status in (408, 504):
        return Refused(504, "the upstream server did not answer in time")
    if status in (401, 403):
        return Refused(502, f"the upstream server refuses the key of this server, the value of {KEY}")
    if status == 404:
        return Refused(502, "the upstream server has no completions: its base URL mostly ends in /v1")
    if status in (400, 413, 422):
        try:
            said = json.loads(await response.aread())
            message = str((said.get("error") or said)["message"])
        except (ValueError, LookupError, TypeError, AttributeError, httpx2.HTTPError):
            message = "it does not say why"
        return Refused(502, f"the upstream server refuses the request: {GradmemError(message[:300])}")
    return Refused(502, f"the upstream server failed with status {status}")
