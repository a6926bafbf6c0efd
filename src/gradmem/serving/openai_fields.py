"""Fields that the requests of OpenAI's API share. Each works, has no effect, or is refused by name."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from .http_errors import UNSUPPORTED, Refused
from .validation import Line

MAX_TOKENS = 1024
"""Most tokens of an answer: what is generated for one client keeps the model from the others."""
MAX_CHOICES = 16
MAX_STOPS = 4


def refused_but(*accepted: Any) -> Any:
    """Type of a field that the server cannot obey: null and these values, which ask for nothing, are accepted."""
    shown = [json.dumps(one) for one in (*accepted, None)]

    def check(value: Any) -> Any:
        if value is None or any(type(value) is type(one) and value == one for one in accepted):
            return value
        raise PydanticCustomError(UNSUPPORTED, "not supported: leave it out")  # type: ignore[arg-type]

    return Annotated[Any, AfterValidator(check), Field(description=f"Refused, unless it is {' or '.join(shown)}.")]


def only(*supported: str) -> Any:
    """Type of a field that has one of these values; all others are refused as not supported."""

    def check(value: str) -> str:
        if value in supported:
            return value
        known = " or ".join(f"'{one}'" for one in supported)
        raise PydanticCustomError(
            UNSUPPORTED, "'{given}' is not supported, only {known}", {"given": value[:40], "known": known}
        )

    return Annotated[Line, AfterValidator(check)]


Refusable = refused_but()
"""A field that is refused unless it is null."""
Unused = Annotated[Any, Field(description="Accepted; it has no effect here.")]
"""A field that asks for nothing that a server of one's own does: labels, caches and prices of OpenAI's."""
Temperature = Annotated[float | None, Field(ge=0, le=2, description="0 is greedy. Default: 0; 1 if `top_p` is given.")]
TopP = Annotated[float | None, Field(ge=0, le=1)]
Penalty = Annotated[float | None, Field(ge=-2, le=2)]
TokenLimit = Annotated[int | None, Field(ge=1, le=MAX_TOKENS, description="Default: that of the model's task.")]
TopLogprobs = Annotated[int | None, Field(ge=0, le=20)]


class Strict(BaseModel):
    """An object without unknown fields."""

    model_config = ConfigDict(extra="forbid")


class StreamOptions(Strict):
    """What a stream holds besides the answer."""

    include_usage: bool | None = Field(False, description="End with a chunk that has the usage.")
    include_obfuscation: refused_but(False) = None  # type: ignore[valid-type]


class Asking(Strict):
    """What asks a memory: the fields that all requests share."""

    model: Line = Field(description="`CHECKPOINT:MEMORY`, or the checkpoint if `memory_id` names the memory.")
    memory_id: Line | None = Field(None, description="Id or name of a memory.")
    stream: bool | None = False
    temperature: Temperature = None
    top_p: TopP = None
    metadata: Unused = None
    parallel_tool_calls: Unused = None
    prompt_cache_key: Unused = None
    prompt_cache_options: Unused = None
    prompt_cache_retention: Unused = None
    safety_identifier: Unused = None
    service_tier: Unused = None
    user: Unused = None
    moderation: Refusable = None
    store: refused_but(False) = None  # type: ignore[valid-type]
    tool_choice: refused_but("none", "auto") = None  # type: ignore[valid-type]
    tools: refused_but([]) = None  # type: ignore[valid-type]

    @property
    def named(self) -> tuple[str, str]:
        """The checkpoint and the memory that are asked.

        Raises
        ------
        Refused
            If no memory is named.
        """
        checkpoint, _, ref = self.model.partition(":")
        if not (ref := self.memory_id or ref):
            message = "no memory is named: give its id as `memory_id`, or CHECKPOINT:MEMORY as `model`"
            raise Refused(400, message, param="model", code="invalid_value")
        return checkpoint, ref

    @property
    def heat(self) -> float:
        """The temperature: answers are greedy unless the request asks for draws."""
        if self.temperature is not None:
            return self.temperature
        return 0.0 if self.top_p is None else 1.0

    @property
    def share(self) -> float:
        """The share of probability that is drawn from."""
        return 1.0 if self.top_p is None else self.top_p


def messages_of(turns: list[tuple[str, str]], param: str) -> list[dict[str, str]]:
    """Roles and texts as the model reads them.

    Raises
    ------
    Refused
        If none is a message of the user.
    """
    if not any(role == "user" for role, _ in turns):
        raise Refused(400, "the conversation has no message with the role `user`", param=param, code="invalid_value")
    return [{"role": role, "content": text} for role, text in turns]
