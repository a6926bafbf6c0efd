"""What a request to `/v1/chat/completions` may hold, and what it asks for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from ..sampling import Sampling
from .http_errors import Refused
from .openai_fields import (
    MAX_CHOICES,
    MAX_STOPS,
    Asking,
    Penalty,
    StreamOptions,
    Strict,
    TokenLimit,
    TopLogprobs,
    Unused,
    messages_of,
    refused_but,
)
from .validation import Content, Stop


class Part(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: Content
    prompt_cache_breakpoint: Unused = None


def text_or_list(value: Any) -> str:
    """Tell a text from a list; the name of either is no part of a field's name."""
    return "[list]" if isinstance(value, list) else "[text]"


Parts = Annotated[list[Part], Field(max_length=100, fail_fast=True)]
TextOrParts = Annotated[
    Annotated[Content, Tag("[text]")] | Annotated[Parts, Tag("[list]")], Discriminator(text_or_list)
]


class Message(Strict):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: TextOrParts | None = None
    name: Unused = None
    annotations: Any = refused_but([])
    audio: Any = refused_but()
    function_call: Any = refused_but()
    refusal: Any = refused_but()
    tool_calls: Any = refused_but([])
    tool_call_id: Any = refused_but()

    @property
    def text(self) -> str:
        """The text of all parts."""
        content = self.content or ""
        return content if isinstance(content, str) else "".join(part.text for part in content)


Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)]
StopOrStops = Annotated[Annotated[Stop, Tag("[text]")] | Annotated[Stops, Tag("[list]")], Discriminator(text_or_list)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenId = Annotated[int, Field(ge=0)]


class ChatRequest(Asking):
    """A conversation, whose last message of the user is answered.

    A plain language model (task `document`) reads the whole conversation behind its memory; what is said as `system` or
    `developer` stands before the first question. A checkpoint of another task reads the last message of the user alone.
    """

    messages: list[Message] = Field(min_length=1, max_length=1000, fail_fast=True)
    stream_options: StreamOptions | None = None
    n: int | None = Field(1, ge=1, le=MAX_CHOICES, description="Answers to the one conversation.")
    max_completion_tokens: TokenLimit = None
    max_tokens: TokenLimit = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1, description="The same seed draws the same answer.")
    frequency_penalty: Penalty = None
    presence_penalty: Penalty = None
    logit_bias: dict[TokenId, Bias] | None = Field(None, max_length=300, description="By token id.")
    logprobs: bool | None = Field(None, description="Return the log-probability of each token.")
    top_logprobs: TopLogprobs = None
    stop: StopOrStops | None = Field(None, description="Up to 4 texts that end the answer, which has none of them.")
    audio: Any = refused_but()
    function_call: Any = refused_but("none", "auto")
    functions: Any = refused_but([])
    modalities: Any = refused_but(["text"])
    prediction: Any = refused_but()
    reasoning_effort: Any = refused_but("none")
    response_format: Any = refused_but({"type": "text"})
    verbosity: Any = refused_but("medium")
    web_search_options: Any = refused_but()

    @property
    def conversation(self) -> list[dict[str, str]]:
        """The messages as the model reads them."""
        return messages_of([(message.role, message.text) for message in self.messages], "messages")

    @property
    def samplings(self) -> list[Sampling]:
        """The options of each of the `n` answers.

        Raises
        ------
        Refused
            If fields contradict each other.
        """
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise _contradiction("max_tokens", "give it or `max_completion_tokens`, not both")
        if self.top_logprobs is not None and not self.logprobs:
            raise _contradiction("top_logprobs", "it needs `logprobs: true`")
        if self.stream_options is not None and not self.stream:
            raise _contradiction("stream_options", "it needs `stream: true`")
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [
            Sampling(
                max_tokens=self.max_completion_tokens or self.max_tokens,
                temperature=self.effective_temperature,
                top_p=self.effective_top_p,
                seed=None if self.seed is None else (self.seed + choice) % 2**63,
                presence_penalty=self.presence_penalty or 0.0,
                frequency_penalty=self.frequency_penalty or 0.0,
                logit_bias=self.logit_bias or {},
                stop=tuple(stop),
                top_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            )
            for choice in range(self.n or 1)
        ]


def _contradiction(param: str, why: str) -> Refused:
    return Refused(400, f"{param}: {why}", param=param, code="invalid_value")
