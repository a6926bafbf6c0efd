"""`/v1/models` and `/v1/chat/completions`: the parts of OpenAI's API that its clients need to ask a memory."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from ...errors import GradmemError
from ...model import Answer
from ...store.store import PAGE
from ..async_store import OwnStore
from ..engine_pool import Pool
from ..streaming import ProgressStream, server_sent
from ..validation import Content, JsonRoute, Line
from .memories import open_memory

router = APIRouter(prefix="/v1", tags=["OpenAI"], route_class=JsonRoute)


class Part(BaseModel):
    """A part of a message."""

    type: Literal["text"]
    text: Content


Parts = Annotated[list[Part], Field(max_length=100, fail_fast=True)]


class Message(BaseModel):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | Parts | None = None

    @property
    def text(self) -> str:
        """The text of all parts."""
        content = self.content or ""
        return content if isinstance(content, str) else "".join(part.text for part in content)


class StreamOptions(BaseModel):
    """What a stream holds besides the answer."""

    include_usage: bool | None = False


class CompletionRequest(BaseModel):
    """A conversation, whose last message of the user is answered.

    A plain language model (task `document`) reads the whole conversation behind its memory; what is said as `system` or
    `developer` stands before the first question. A checkpoint of another task reads the last message of the user alone.
    Each request gets one answer, which is greedy and as short as those of the task. Other options are ignored.
    """

    model: Line = Field(description="`CHECKPOINT:MEMORY`, or the checkpoint if `memory_id` names the memory.")
    messages: list[Message] = Field(min_length=1, max_length=1000, fail_fast=True)
    memory_id: Line | None = Field(None, description="Id or name of a memory.")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = 1


class Choice(BaseModel):
    """The answer as `message`, or the next piece of a streamed answer as `delta`."""

    index: int = 0
    message: Message | None = None
    delta: dict[str, Any] | None = None
    finish_reason: Literal["stop", "length"] | None = None


class Usage(BaseModel):
    """Number of tokens that were read and generated. The memory itself counts no tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, answer: Answer) -> Usage:
        """Return the usage of an answer."""
        asked, answered = answer.query_tokens, answer.answer_tokens
        return cls(prompt_tokens=asked, completion_tokens=answered, total_tokens=asked + answered)


class Completion(BaseModel):
    """An answer. The field `gradmem` holds its evidence, such as log-probabilities."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    gradmem: Answer


class Model(BaseModel):
    """A checkpoint, or a memory that can be asked."""

    id: str
    object: str = "model"
    created: int = 0
    owned_by: str = "gradmem"


class Models(BaseModel):
    """The checkpoints and memories of the server."""

    object: str = "list"
    data: list[Model]


@router.get("/models")
async def models(store: OwnStore, engines: Pool) -> Models:
    """List the checkpoints, and the newest memories as `CHECKPOINT:MEMORY`."""
    page = await store.read(lambda s: s.list(limit=PAGE))
    memories = [
        Model(id=f"{entry.model}:{entry.label}", created=int(entry.created.timestamp()))
        for entry in page
        if entry.model in engines.names
    ]
    return Models(data=[*(Model(id=name) for name in engines.names), *memories])


@router.post("/chat/completions", response_model=Completion, response_model_exclude_none=True)
async def complete(asked: CompletionRequest, store: OwnStore, engines: Pool) -> Any:
    """Answer the last message of the user from a memory, which stands before the conversation."""
    checkpoint, _, ref = asked.model.partition(":")
    if not (ref := asked.memory_id or ref):
        raise GradmemError("no memory is named: give its id as `memory_id`, or CHECKPOINT:MEMORY as `model`")
    query = [{"role": message.role, "content": message.text} for message in asked.messages]
    if not any(message["role"] == "user" for message in query):
        raise GradmemError("the conversation has no message with the role `user`")
    engine, memory, key = await open_memory(ref, store, engines)
    if engine.model.name != checkpoint:
        raise GradmemError(f"the memory was written by '{engine.model.name}', not by '{checkpoint}'")
    common: dict[str, Any] = {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": asked.model,
    }
    if asked.stream:
        progress = ProgressStream[str]()
        future = engine.ask(key, memory, query, on_text=progress.publish)
        with_usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
        return await server_sent(_chunks(common, progress, future, with_usage), end="data: [DONE]\n\n")
    answer = await asyncio.wrap_future(engine.ask(key, memory, query))
    message = Message(role="assistant", content=answer.text)
    choice = Choice(message=message, finish_reason=answer.finish_reason)
    return Completion(**common, object="chat.completion", choices=[choice], usage=Usage.of(answer), gradmem=answer)


async def _chunks(
    common: dict[str, Any], progress: ProgressStream[str], future: Future[Answer], with_usage: bool
) -> AsyncIterator[tuple[None, Any]]:
    """Yield the answer piece by piece. The last choice holds the reason of its end, and the evidence."""

    def chunk(*choices: dict[str, Any], **more: Any) -> Any:
        return None, {**common, "object": "chat.completion.chunk", "choices": choices, **more}

    def piece(text: str) -> Any:
        delta = {"role": "assistant", "content": text}
        return chunk({"index": 0, "delta": delta, "finish_reason": None})

    sent = ""
    async for text in progress.events(future):
        yield piece(text[len(sent) :])
        sent = text
    answer = future.result()
    if not answer.text.startswith(sent):
        raise RuntimeError("`Task.settled` returned a text that the answer does not begin with")
    if not sent or answer.text != sent:
        yield piece(answer.text[len(sent) :])
    yield chunk({"index": 0, "delta": {}, "finish_reason": answer.finish_reason}, gradmem=answer)
    if with_usage:
        yield chunk(usage=Usage.of(answer))
