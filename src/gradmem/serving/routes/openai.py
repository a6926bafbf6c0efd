"""The parts of OpenAI's API that its clients need to ask a memory."""

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
from ...model.abstain import Answer
from ...store.store import PAGE
from ..bodies import Content, JsonRoute, Line
from ..engine_pool import Served
from ..owned import Owned
from ..streaming import Following, server_sent
from .memories import opened

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
        """All its text."""
        content = self.content or ""
        return content if isinstance(content, str) else "".join(part.text for part in content)


class StreamOptions(BaseModel):
    """What a stream is to have besides the answer."""

    include_usage: bool | None = False


class Completion(BaseModel):
    """What is asked. Only the last message of the user is: a memory knows nothing of the conversation.

    Answers are greedy, as short as the task's, and one for each request, whatever other options say.
    """

    model: Line = Field(description="`CHECKPOINT:MEMORY`, or the checkpoint where `memory_id` says which memory.")
    messages: list[Message] = Field(min_length=1, max_length=1000, fail_fast=True)
    memory_id: Line | None = Field(None, description="Id or name of a memory.")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = 1


class Choice(BaseModel):
    """The answer, as `message`, or in a stream what is added to it, as `delta`."""

    index: int = 0
    message: Message | None = None
    delta: dict[str, Any] | None = None
    finish_reason: Literal["stop", "length"] | None = None


class Usage(BaseModel):
    """Tokens that were read and generated; those of the memory count as none."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, answer: Answer) -> Usage:
        """What an answer took."""
        asked, answered = answer.query_tokens, answer.answer_tokens
        return cls(prompt_tokens=asked, completion_tokens=answered, total_tokens=asked + answered)


class Completed(BaseModel):
    """An answer; `gradmem` has what speaks for it."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    gradmem: Answer


class Model(BaseModel):
    """Something to ask."""

    id: str
    object: str = "model"
    created: int = 0
    owned_by: str = "gradmem"


class Models(BaseModel):
    """All there is to ask."""

    object: str = "list"
    data: list[Model]


@router.get("/models")
async def models(store: Owned, engines: Served) -> Models:
    """The checkpoints, and the newest memories as `CHECKPOINT:MEMORY`."""
    page = await store.read(lambda kept: kept.list(limit=PAGE))
    memories = [
        Model(id=f"{entry.model}:{entry.label}", created=int(entry.created.timestamp()))
        for entry in page
        if entry.model in engines.names
    ]
    return Models(data=[*(Model(id=name) for name in engines.names), *memories])


@router.post("/chat/completions", response_model=Completed, response_model_exclude_none=True)
async def complete(asked: Completion, store: Owned, engines: Served) -> Any:
    """Answer the last message of the user from a memory alone."""
    checkpoint, _, ref = asked.model.partition(":")
    if not (ref := asked.memory_id or ref):
        raise GradmemError("which memory? Give its id as `memory_id`, or CHECKPOINT:MEMORY as `model`")
    query = next((message.text for message in reversed(asked.messages) if message.role == "user"), None)
    if query is None:
        raise GradmemError("there is no message of the user")
    engine, memory, key = await opened(ref, store, engines)
    if engine.model.name != checkpoint:
        raise GradmemError(f"the memory was written by '{engine.model.name}', not by '{checkpoint}'")
    about: dict[str, Any] = {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": asked.model,
    }
    if asked.stream:
        following = Following[str]()
        future = engine.ask(key, memory, query, on_text=following.tell)
        with_usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
        return await server_sent(_chunks(about, following, future, with_usage), end="data: [DONE]\n\n")
    answer = await asyncio.wrap_future(engine.ask(key, memory, query))
    message = Message(role="assistant", content=answer.text)
    choice = Choice(message=message, finish_reason=answer.finish_reason)
    return Completed(**about, object="chat.completion", choices=[choice], usage=Usage.of(answer), gradmem=answer)


async def _chunks(
    about: dict[str, Any], following: Following[str], future: Future[Answer], with_usage: bool
) -> AsyncIterator[tuple[None, Any]]:
    """What is added to the answer, as it comes; the last choice says how it ended and how far to trust it."""

    def chunk(*choices: dict[str, Any], **more: Any) -> Any:
        return None, {**about, "object": "chat.completion.chunk", "choices": choices, **more}

    def added(text: str) -> Any:
        delta = {"role": "assistant", "content": text}
        return chunk({"index": 0, "delta": delta, "finish_reason": None})

    sent = ""
    async for text in following.until_done(future):
        yield added(text[len(sent) :])
        sent = text
    answer = future.result()
    if not answer.text.startswith(sent):
        raise RuntimeError("a task settled what it then wrote otherwise")
    if not sent or answer.text != sent:
        yield added(answer.text[len(sent) :])
    yield chunk({"index": 0, "delta": {}, "finish_reason": answer.finish_reason}, gradmem=answer)
    if with_usage:
        yield chunk(usage=Usage.of(answer))
