"""The parts of OpenAI's API that its clients need to ask a memory."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from ..errors import GradmemError
from ..store.store import PAGE
from ..trust import Answer
from .following import Following, server_sent
from .memories import Owned, Served, Text, opened

router = APIRouter(prefix="/v1", tags=["OpenAI"])


class Part(BaseModel):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[Part] | None = None

    @property
    def text(self) -> str:
        """All its text."""
        content = self.content or ""
        return content if isinstance(content, str) else "".join(part.text for part in content)


class Completion(BaseModel):
    """What is asked. Only the last message of the user is: a memory knows nothing of the conversation.

    Answers are greedy, as short as the task's, and one for each request, whatever other options say.
    """

    model: Text = Field(description="`CHECKPOINT:MEMORY`, or the checkpoint where `memory_id` says which memory.")
    messages: list[Message] = Field(min_length=1, max_length=1000)
    memory_id: Text | None = Field(None, description="Id or name of a memory.")
    stream: bool | None = False
    n: Literal[1] | None = 1


class Choice(BaseModel):
    """The answer, as `message`, or in a stream what is added to it, as `delta`."""

    index: int = 0
    message: Message | None = None
    delta: dict[str, Any] | None = None
    finish_reason: Literal["stop"] | None = "stop"


class Completed(BaseModel):
    """An answer; `gradmem` has what speaks for it."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    gradmem: Answer | None = None


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
    page = await asyncio.to_thread(store.list, limit=PAGE)
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
        return await server_sent(_chunks(about, following, future), end="data: [DONE]\n\n")
    answer = await asyncio.wrap_future(engine.ask(key, memory, query))
    message = Message(role="assistant", content=answer.text)
    return Completed(**about, object="chat.completion", choices=[Choice(message=message)], gradmem=answer)


async def _chunks(
    about: dict[str, Any], following: Following[str], future: Future[Answer]
) -> AsyncIterator[tuple[None, Any]]:
    """What is added to the answer, as it comes; the last one says how far to trust it."""

    def chunk(delta: dict[str, str], end: Literal["stop"] | None = None, answer: Answer | None = None) -> Any:
        choice = {"index": 0, "delta": delta, "finish_reason": end}
        found = {**about, "object": "chat.completion.chunk", "choices": [choice]}
        return None, found if answer is None else {**found, "gradmem": answer}

    sent = ""
    async for text in following.until_done(future):
        # What is decoded of half a character may change: wait for the other half.
        if text.startswith(sent) and not text.endswith("\ufffd"):
            yield chunk({"role": "assistant", "content": text[len(sent) :]})
            sent = text
    answer = future.result()
    yield chunk({"role": "assistant", "content": answer.text.removeprefix(sent)})
    yield chunk({}, "stop", answer)
