"""A server with vLLM's `/v1/completions` on a thread: it checks as vLLM does, and answers by transformers.

Written from vLLM's documented protocol (`CompletionRequest`, `CompletionStreamResponse`). It is stricter: vLLM ignores
unknown fields, and here they are errors.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from torch import Tensor
from transformers import PreTrainedModel
from uvicorn.protocols.http.h11_impl import H11Protocol

from exports.vllm_standin import Refused, received

FIELDS = {
    "prompt_embeds": str, "max_tokens": int, "temperature": float, "top_p": float, "top_k": int, "min_p": float,
    "repetition_penalty": float, "presence_penalty": float, "frequency_penalty": float, "logit_bias": dict | None,
    "seed": int | None, "ignore_eos": bool, "stop_token_ids": list, "logprobs": int,
    "return_tokens_as_token_ids": bool, "return_token_ids": bool, "stream": bool,
}  # fmt: skip
"""Fields of a request, of those that vLLM has, with their types."""
MAX_LOGPROBS = 20


@dataclass
class Upstream:
    """What the server has, how it misbehaves, and what it was sent.

    Attributes
    ----------
    model : PreTrainedModel
    key : str
        API key; none is needed if it is empty.
    refuse : list of int
        Statuses with which the next requests are answered.
    drop : int
        Connections that are closed without an answer.
    tokens_before_end : int, optional
        Tokens after which the connection breaks off.
    hold : bool
        Whether nothing is answered after the first token.
    """

    model: PreTrainedModel
    key: str = ""
    refuse: list[int] = field(default_factory=list)
    drop: int = 0
    tokens_before_end: int | None = None
    hold: bool = False
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    left: int = 0
    """Clients that left before their answer was complete."""
    url: str = ""

    async def complete(self, request: Request) -> Response:
        """Answer `POST /v1/completions`."""
        self.headers.append(dict(request.headers))
        if self.refuse:
            return self._error(self.refuse.pop(0), "not now", {"Retry-After": "7"})
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return self._error(401, "Unauthorized")
        body = json.loads(await request.body())
        self.bodies.append(body)
        try:
            embeds = self._checked(body)
        except Refused as error:
            return self._error(400, str(error))
        return StreamingResponse(self._events(embeds, body), media_type="text/event-stream")

    def _checked(self, body: dict[str, Any]) -> Tensor:
        if unknown := body.keys() - FIELDS.keys():
            raise Refused(f"unknown fields: {unknown}")
        for name, value in body.items():
            if not isinstance(value, FIELDS[name]):
                raise Refused(f"{name} has type {type(value)}")
        if body["logprobs"] > MAX_LOGPROBS or not body["stream"]:
            raise Refused("this stand-in only streams")
        embeds = received(body["prompt_embeds"], self.model.config.hidden_size, self.model.dtype)
        if len(embeds) + body["max_tokens"] > self.model.config.max_position_embeddings:
            raise Refused("This model's maximum context length is exceeded")
        return embeds

    async def _events(self, embeds: Tensor, body: dict[str, Any]) -> AsyncIterator[str]:
        try:
            for count, choice in enumerate(self._choices(embeds, body)):
                if count == self.tokens_before_end:
                    raise ConnectionError
                if count and self.hold:
                    await asyncio.Event().wait()
                await asyncio.sleep(0)  # a client that left is noticed
                yield f"data: {json.dumps({'id': 'cmpl-1', 'object': 'text_completion', 'choices': [choice]})}\n\n"
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.left += 1
            raise

    @torch.no_grad()
    def _choices(self, embeds: Tensor, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Greedy tokens one by one, each computed from the whole input anew."""
        for place in range(body["max_tokens"]):
            scores = self.model(inputs_embeds=embeds[None]).logits[0, -1].float()
            for token, more in (body["logit_bias"] or {}).items():
                scores[int(token)] += more
            logprobs = scores.log_softmax(-1)
            token = int(logprobs.argmax())
            embeds = torch.cat([embeds, self.model.get_input_embeddings()(torch.tensor([token]))])
            top = logprobs.topk(body["logprobs"])
            named = {f"token_id:{one}": own for one, own in zip(top.indices.tolist(), top.values.tolist(), strict=True)}
            stopped = token in body["stop_token_ids"]
            reason = "stop" if stopped else "length" if place + 1 == body["max_tokens"] else None
            yield {
                "index": 0,
                "text": "" if stopped else f"<{token}>",
                "logprobs": {
                    "text_offset": [0],
                    "token_logprobs": [float(logprobs[token])],
                    "tokens": [f"token_id:{token}"],
                    "top_logprobs": [named],
                },
                "finish_reason": reason,
                "stop_reason": token if stopped else None,
                "token_ids": [token],
            }
            if reason:
                return

    @staticmethod
    def _error(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
        return JSONResponse({"error": {"message": message, "type": "error", "code": status}}, status, headers)


@contextmanager
def running(upstream: Upstream) -> Iterator[Upstream]:
    """Serve on a free port of this machine."""
    app = Starlette(routes=[Route("/v1/completions", upstream.complete, methods=["POST"])])

    class Dropping(H11Protocol):
        def data_received(self, data: bytes) -> None:
            if upstream.drop:
                upstream.drop -= 1
                self.transport.abort()
            else:
                super().data_received(data)

    config = uvicorn.Config(app, http=Dropping, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        upstream.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield upstream
        finally:
            server.should_exit = True
            thread.join()
