"""`/v1/responses`: ask a memory through OpenAI's newer API. Responses are not kept."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from itertools import count
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel

from ...model import Answer
from ...sampling import Token
from ..async_store import OwnStore
from ..engine_pool import Pool
from ..http_errors import ERROR_RESPONSES, Refused
from ..openai_answers import Answers, logprobs_of
from ..openai_responses import ResponseRequest
from ..streaming import server_sent
from ..validation import OpenAIRoute
from .chat import Logprob, answers_to

router = APIRouter(prefix="/v1/responses", tags=["OpenAI"], route_class=OpenAIRoute)
Status = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputText(BaseModel):
    """The text of an answer."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = []
    logprobs: list[Logprob] = []


class OutputMessage(BaseModel):
    """An answer. The field `gradmem` holds its evidence, such as how sure it is that this was written."""

    type: Literal["message"] = "message"
    id: str
    role: Literal["assistant"] = "assistant"
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]
    gradmem: Answer | None = None


class InputDetails(BaseModel):
    """The memory itself counts no tokens, and no prompt is kept."""

    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputDetails(BaseModel):
    """Nothing is thought before an answer."""

    reasoning_tokens: int = 0


class ResponseUsage(BaseModel):
    """Number of tokens that were read and generated."""

    input_tokens: int
    input_tokens_details: InputDetails = InputDetails()
    output_tokens: int
    output_tokens_details: OutputDetails = OutputDetails()
    total_tokens: int


class ResponseFailure(BaseModel):
    """Why there is no answer."""

    code: str
    message: str


class Incomplete(BaseModel):
    """Why an answer was cut off."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ModelResponse(BaseModel):
    """A response, with the fields of its request that shaped it."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status
    error: ResponseFailure | None = None
    incomplete_details: Incomplete | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage] = []
    parallel_tool_calls: bool = False
    previous_response_id: None = None
    store: bool = False
    temperature: float
    text: dict[str, Any] = {"format": {"type": "text"}}
    tool_choice: Literal["none"] = "none"
    tools: list[Any] = []
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None

    def failed(self, error: Refused) -> ModelResponse:
        """This response, ended by an error."""
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        failure = ResponseFailure(code=code, message=error.message)
        return self.model_copy(update={"status": "failed", "error": failure, "output": []})

    def answered(self, item: str, answer: Answer, tokens: list[Token]) -> ModelResponse:
        """This response, ended by an answer."""
        cut = answer.finish_reason == "length"
        text = OutputText(text=answer.text, logprobs=[Logprob(**one) for one in logprobs_of(tokens)])
        status: Literal["completed", "incomplete"] = "incomplete" if cut else "completed"
        message = OutputMessage(id=item, status=status, content=[text], gradmem=answer)
        usage = ResponseUsage(
            input_tokens=answer.query_tokens,
            output_tokens=answer.answer_tokens,
            total_tokens=answer.query_tokens + answer.answer_tokens,
        )
        details = Incomplete() if cut else None
        given = {"status": status, "output": [message], "usage": usage, "incomplete_details": details}
        return self.model_copy(update=given)


@router.post("", response_model=ModelResponse)
async def respond(asked: ResponseRequest, store: OwnStore, engines: Pool) -> Any:
    """Answer the last message of the user from a memory, which stands before the conversation."""
    answers = await answers_to(asked, asked.messages, [asked.sampling], store, engines)
    begun = ModelResponse(
        id=f"resp_{secrets.token_hex(24)}",
        created_at=int(time.time()),
        status="in_progress",
        instructions=asked.instructions,
        max_output_tokens=asked.max_output_tokens,
        metadata=asked.metadata or {},
        model=asked.model,
        temperature=asked.effective_temperature,
        top_logprobs=asked.top_logprobs or 0,
        top_p=asked.effective_top_p,
    )
    item = f"msg_{secrets.token_hex(24)}"
    if not asked.stream:
        (answer,) = await answers.finished()
        return begun.answered(item, answer, answers.tokens[0])
    numbers = count()

    def event(name: str, **fields: Any) -> tuple[str, dict[str, Any]]:
        return name, {"type": name, "sequence_number": next(numbers), **fields}

    return await server_sent(
        _events(begun, item, answers, event),
        failure=lambda error: event("response.failed", response=begun.failed(error)),
    )


async def _events(
    begun: ModelResponse, item: str, answers: Answers, event: Any
) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """Yield the events of a streamed response. The first ones come with the first text: until then it may fail."""
    place = {"item_id": item, "output_index": 0, "content_index": 0}
    started = False
    async for piece in answers.pieces():
        if not started:
            started = True
            yield event("response.created", response=begun)
            yield event("response.in_progress", response=begun)
            message = OutputMessage(id=item, status="in_progress", content=[])
            yield event("response.output_item.added", output_index=0, item=message)
            yield event("response.content_part.added", part=OutputText(text=""), **place)
        yield event("response.output_text.delta", delta=piece.text, logprobs=logprobs_of(piece.tokens), **place)
    ended = begun.answered(item, answers.answers[0], answers.tokens[0])
    (message,), (text,) = ended.output, ended.output[0].content
    yield event("response.output_text.done", text=text.text, logprobs=text.logprobs, **place)
    yield event("response.content_part.done", part=text, **place)
    yield event("response.output_item.done", output_index=0, item=message)
    yield event(f"response.{ended.status}", response=ended)


async def not_kept(response: str) -> None:
    """Say that responses are not kept."""
    message = "responses are not kept here: send the whole conversation as `input`"
    raise Refused(404, message, param="response_id", code="not_found")


for method, path in (
    ("GET", "/{response}"),
    ("DELETE", "/{response}"),
    ("POST", "/{response}/cancel"),
    ("GET", "/{response}/input_items"),
):
    router.add_api_route(path, not_kept, methods=[method], responses=ERROR_RESPONSES)
