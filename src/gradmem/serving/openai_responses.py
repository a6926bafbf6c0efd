"""What a request to `/v1/responses` may hold, and what it asks for."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from ..sampling import Sampling
from .openai_chat import text_or_list
from .openai_fields import (
    Asking,
    Refusable,
    Strict,
    TokenLimit,
    TopLogprobs,
    Unused,
    messages_of,
    only,
    refused_but,
)
from .validation import Content

LOGPROBS = "message.output_text.logprobs"
"""What `include` may name."""


class Part(Strict):
    """A part of a message: one that was said, or one of an earlier answer."""

    type: only("input_text", "output_text")  # type: ignore[valid-type]
    text: Content
    annotations: refused_but([]) = None  # type: ignore[valid-type]
    logprobs: Unused = None
    prompt_cache_breakpoint: Unused = None


Parts = Annotated[list[Part], Field(max_length=100, fail_fast=True)]
TextOrParts = Annotated[
    Annotated[Content, Tag("[text]")] | Annotated[Parts, Tag("[list]")], Discriminator(text_or_list)
]


class Item(Strict):
    """A message, which is the only kind of item that a memory can be asked with."""

    type: only("message") = "message"  # type: ignore[valid-type]
    role: only("system", "developer", "user", "assistant")  # type: ignore[valid-type]
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

    type: only("text")  # type: ignore[valid-type]


class TextOptions(Strict):
    """How an answer is written, and how much."""

    format: Format | None = None
    verbosity: refused_but("medium") = None  # type: ignore[valid-type]


class Reasoning(Strict):
    """Answers are given at once, without thinking first."""

    effort: refused_but("none") = None  # type: ignore[valid-type]
    generate_summary: Refusable = None
    summary: Refusable = None


class ResponseStreamOptions(Strict):
    """What a stream holds besides the answer."""

    include_obfuscation: refused_but(False) = None  # type: ignore[valid-type]


class ResponseRequest(Asking):
    """A question or a conversation, whose last message of the user is answered as by `/v1/chat/completions`.

    The server keeps no responses: each request brings the whole conversation.
    """

    input: TextOrItems = Field(description="The question, or the messages of a conversation.")
    instructions: Content | None = Field(None, description="What the model is told before the conversation.")
    max_output_tokens: TokenLimit = None
    metadata: dict[str, str] | None = Field(None, max_length=16, description="Returned with the response.")
    include: list[only(LOGPROBS)] | None = Field(None, max_length=100)  # type: ignore[valid-type]
    top_logprobs: TopLogprobs = None
    stream_options: ResponseStreamOptions | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    access_programs: Refusable = None
    background: refused_but(False) = None  # type: ignore[valid-type]
    background_options: Refusable = None
    context_management: refused_but([]) = None  # type: ignore[valid-type]
    conversation: Refusable = None
    image: Refusable = None
    max_tool_calls: Unused = None
    previous_response_id: Refusable = None
    prompt: Refusable = None
    truncation: refused_but("disabled") = None  # type: ignore[valid-type]

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
            temperature=self.heat,
            top_p=self.share,
            top_logprobs=(self.top_logprobs or 0) if wanted else None,
        )
