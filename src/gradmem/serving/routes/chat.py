"""`/v1/chat/completions`: ask a memory as OpenAI's clients ask a model."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel

from ...model import Answer
from ...sampling import Sampling
from ..async_store import AsyncStore, OwnStore
from ..engine_pool import EnginePool, Pool
from ..openai_answers import Answers, logprobs_of
from ..openai_chat import ChatRequest
from ..openai_fields import Asking
from ..streaming import server_sent
from ..validation import OpenAIRoute
from .memories import open_memory
from .models import not_its_writer

router = APIRouter(prefix="/v1/chat", tags=["OpenAI"], route_class=OpenAIRoute)


class Said(BaseModel):
    """The message of an answer."""

    role: Literal["assistant"] = "assistant"
    content: str


class TopLogprob(BaseModel):
    """A token that could have come. `bytes` is null for a part of a character."""

    token: str
    bytes: list[int] | None
    logprob: float


class Logprob(TopLogprob):
    """A token that came, and the likeliest ones at its place."""

    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    """The tokens of an answer, without its end token."""

    content: list[Logprob]


class Choice(BaseModel):
    """One answer. The field `gradmem` holds its evidence, such as how sure it is that this was written."""

    index: int
    message: Said
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"]
    gradmem: Answer


class Usage(BaseModel):
    """Number of tokens that were read and generated. The memory itself counts no tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, answers: list[Answer]) -> Usage:
        """Return the usage of answers to one conversation."""
        asked, answered = answers[0].query_tokens, sum(answer.answer_tokens for answer in answers)
        return cls(prompt_tokens=asked, completion_tokens=answered, total_tokens=asked + answered)


class Completion(BaseModel):
    """The answers to a conversation."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage


async def answers_to(
    asked: Asking, messages: list[dict[str, str]], samplings: list[Sampling], store: AsyncStore, engines: EnginePool
) -> Answers:
    """Ask the memory that a request names."""
    checkpoint, ref = asked.named
    engine, memory, key = await open_memory(ref, store, engines)
    if engine.model.name != checkpoint:
        raise not_its_writer(engine.model.name, checkpoint)
    return Answers(engine, key, memory, messages, samplings)


@router.post("/completions", response_model=Completion, response_model_exclude_none=True)
async def complete(asked: ChatRequest, store: OwnStore, engines: Pool) -> Any:
    """Answer the last message of the user from a memory, which stands before the conversation."""
    samplings = asked.samplings
    answers = await answers_to(asked, asked.conversation, samplings, store, engines)
    common = {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": asked.model,
        "system_fingerprint": f"fp_{answers.fingerprint}",
    }
    if asked.stream:
        return await server_sent(_chunks(common, answers, asked), end="data: [DONE]\n\n")
    found = await answers.finished()
    choices = [
        {
            "index": choice,
            "message": {"content": answer.text},
            "logprobs": {"content": logprobs_of(answers.tokens[choice])} if asked.logprobs else None,
            "finish_reason": answer.finish_reason,
            "gradmem": answer,
        }
        for choice, answer in enumerate(found)
    ]
    return {**common, "choices": choices, "usage": Usage.of(found)}


async def _chunks(
    common: dict[str, Any], answers: Answers, asked: ChatRequest
) -> AsyncIterator[tuple[None, dict[str, Any]]]:
    """Yield the answers piece by piece. The last piece of each has the reason of its end, and the evidence."""
    with_usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)

    def chunk(choices: list[dict[str, Any]], usage: Usage | None = None) -> tuple[None, dict[str, Any]]:
        fields = {**common, "object": "chat.completion.chunk", "choices": choices}
        return None, fields | ({"usage": usage} if with_usage else {})

    begun = set()
    async for piece in answers.pieces():
        delta = {"content": piece.text} if piece.choice in begun else {"role": "assistant", "content": piece.text}
        begun.add(piece.choice)
        logprobs = {"content": logprobs_of(piece.tokens)} if asked.logprobs else None
        yield chunk([{"index": piece.choice, "delta": delta, "logprobs": logprobs, "finish_reason": None}])
    for number, answer in enumerate(answers.answers):
        end = {"index": number, "delta": {}, "logprobs": None, "finish_reason": answer.finish_reason, "gradmem": answer}
        yield chunk([end])
    if with_usage:
        yield chunk([], Usage.of(answers.answers))
