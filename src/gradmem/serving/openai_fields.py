"""Fields that the requests of OpenAI's API share. Each works, has no effect, or is refused by name."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from .http_errors import UNSUPPORTED, Refused
from .validation import Line

MAX_TOKENS = 1024
"""Most tokens of an answer: what is generated for one client keeps the model from the others."""
MAX_CHOICES = 16
MAX_STOPS = 4


def refused_but(*accepted: Any) -> Any:
    """A field that the server cannot obey: null and these values, which ask for nothing, are accepted."""
    values = [*accepted, None]
    shown = " or ".join(f"`{json.dumps(one)}`" for one in accepted)
    description = f"Refused, unless it is {shown}." if accepted else "Refused."
    return Field(None, description=description, json_schema_extra={ACCEPTED: values})


ACCEPTED = "enum"
"""Where the JSON schema of a field has the only values that are accepted."""
Unused = Annotated[Any, Field(description="Accepted; it has no effect here.")]
"""A field that asks for nothing that a server of one's own does: labels, caches and prices of OpenAI's."""
Temperature = Annotated[float | None, Field(ge=0, le=2, description="0 is greedy. Default: 0; 1 if `top_p` is given.")]
TopP = Annotated[float | None, Field(ge=0, le=1, description="Draw from the likeliest tokens that add up to this.")]
Penalty = Annotated[float | None, Field(ge=-2, le=2)]
TokenLimit = Annotated[
    int | None, Field(ge=1, le=MAX_TOKENS, description="Most tokens of an answer. Default: that of the model's task.")
]
TopLogprobs = Annotated[int | None, Field(ge=0, le=20, description="Also of the likeliest tokens at each place.")]


class Strict(BaseModel):
    """An object without unknown fields, and with fields that are refused by name."""

    model_config = ConfigDict(extra="forbid")

    @field_validator("*")
    @classmethod
    def _refuse(cls, value: Any, info: ValidationInfo) -> Any:
        extra = cls.model_fields[info.field_name or ""].json_schema_extra
        if not isinstance(extra, dict) or ACCEPTED not in extra:
            return value
        if any(type(value) is type(one) and value == one for one in extra[ACCEPTED]):  # type: ignore[union-attr]
            return value
        raise PydanticCustomError(UNSUPPORTED, "not supported here: leave it out")


class StreamOptions(Strict):
    """What a stream holds besides the answer."""

    include_usage: bool | None = Field(False, description="End with a chunk that has the usage.")
    include_obfuscation: Any = refused_but(False)


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
    moderation: Any = refused_but()
    store: Any = refused_but(False)
    tool_choice: Any = refused_but("none", "auto")
    tools: Any = refused_but([])

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
    def effective_temperature(self) -> float:
        """The temperature: answers are greedy unless the request asks for draws."""
        if self.temperature is not None:
            return self.temperature
        return 0.0 if self.top_p is None else 1.0

    @property
    def effective_top_p(self) -> float:
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
