"""What a request to `/v1/responses` may hold, and what it asks for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from ..sampling import Sampling
from .openai_chat import text_or_list
from .openai_fields import (
    Asking,
    Strict,
    TokenLimit,
    TopLogprobs,
    Unused,
    messages_of,
    refused_but,
)
from .validation import Content, Line


class Part(Strict):
    """A part of a message: one that was said, or one of an earlier answer."""

    type: Literal["input_text", "output_text"]
    text: Content
    annotations: Any = refused_but([])
    logprobs: Unused = None
    prompt_cache_breakpoint: Unused = None


Parts = Annotated[list[Part], Field(max_length=100, fail_fast=True)]
TextOrParts = Annotated[
    Annotated[Content, Tag("[text]")] | Annotated[Parts, Tag("[list]")], Discriminator(text_or_list)
]


class Item(Strict):
    """A message, which is the only kind of item that a memory can be asked with."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: TextOrParts
    id: Unused = None
    phase: Unused = None
    status: Unused = None
    gradmem: Unused = None

    @property
    def text(self) -> str:
        """The text of all parts."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


Items = Annotated[list[Item], Field(min_length=1, max_length=1000, fail_fast=True)]
TextOrItems = Annotated[
    Annotated[Content, Tag("[text]")] | Annotated[Items, Tag("[list]")], Discriminator(text_or_list)
]


class Format(Strict):
    """How an answer is written."""

    type: Literal["text"]


class TextOptions(Strict):
    """How an answer is written, and how much."""

    format: Format | None = None
    verbosity: Any = refused_but("medium")


class Reasoning(Strict):
    """Answers are given at once, without thinking first."""

    effort: Any = refused_but("none")
    generate_summary: Any = refused_but()
    summary: Any = refused_but()


class ResponseStreamOptions(Strict):
    """What a stream holds besides the answer."""

    include_obfuscation: Any = refused_but(False)


class ResponseRequest(Asking):
    """A question or a conversation, whose last message of the user is answered as by `/v1/chat/completions`.

    The server keeps no responses: each request brings the whole conversation.
    """

    input: TextOrItems = Field(description="The question, or the messages of a conversation.")
    instructions: Content | None = Field(None, description="What the model is told before the conversation.")
    max_output_tokens: TokenLimit = None
    metadata: dict[Line, Line] | None = Field(None, max_length=16, description="Returned with the response.")
    include: list[Literal["message.output_text.logprobs"]] | None = Field(None, max_length=100)
    top_logprobs: TopLogprobs = None
    stream_options: ResponseStreamOptions | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    access_programs: Any = refused_but()
    background: Any = refused_but(False)
    background_options: Any = refused_but()
    context_management: Any = refused_but([])
    conversation: Any = refused_but()
    image: Any = refused_but()
    max_tool_calls: Unused = None
    previous_response_id: Any = refused_but()
    prompt: Any = refused_but()
    truncation: Any = refused_but("disabled")

    @property
    def messages(self) -> list[dict[str, str]]:
        """The messages as the model reads them."""
        said = [("user", self.input)] if isinstance(self.input, str) else [(one.role, one.text) for one in self.input]
        return messages_of([("system", self.instructions or ""), *said], "input")

    @property
    def sampling(self) -> Sampling:
        """The options of the answer."""
        wanted = bool(self.include) or bool(self.top_logprobs)
        return Sampling(
            max_tokens=self.max_output_tokens,
            temperature=self.effective_temperature,
            top_p=self.effective_top_p,
            top_logprobs=(self.top_logprobs or 0) if wanted else None,
        )
