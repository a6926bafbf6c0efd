"""`/v1/checkpoints`: what can be written with, and what to try."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, HTTPException, Query, Request
from pydantic import BaseModel, Field

from ...model import MemoryModel
from ..engine_pool import Served

router = APIRouter(prefix="/v1/checkpoints", tags=["checkpoints"])


class Checkpoints(BaseModel):
    """The checkpoints that are served, and what a client may send to them."""

    checkpoints: list[str]
    max_body: int = Field(description="Bytes that a request may have.")


class Question(BaseModel):
    """A query with its true answer."""

    query: str
    answer: str


class Example(BaseModel):
    """A text to write, and what to ask of it."""

    text: str
    questions: list[Question]


class Checkpoint(BaseModel):
    """What a checkpoint is for, and how it writes."""

    name: str
    task: str
    method: str
    write_steps: int = Field(description="Write steps that it was trained for.")
    max_tokens: int = Field(description="Longest context.")
    vectors: int = Field(description="Memory vectors of a context; 0 where its memory is something else.")
    width: int = Field(description="Numbers in a vector.")
    token_cache_bytes: int | None = Field(
        description="Bytes that the KV-cache of its backbone keeps of each token; null where it has none."
    )
    calibrated: bool = Field(description="Whether answers may say `written` and `abstained`.")
    example: Example | None


@router.get("")
async def checkpoints(request: Request, engines: Served) -> Checkpoints:
    """List the checkpoints."""
    return Checkpoints(checkpoints=list(engines.names), max_body=request.app.state.settings.max_body)


@router.get("/{name:path}")
async def checkpoint(
    name: str,
    engines: Served,
    seed: Annotated[int, Query(ge=0, le=2**31 - 1, description="Another example for another number.")] = 0,
) -> Checkpoint:
    """Describe a checkpoint, which is loaded for it, and draw an example of its task."""
    if name not in engines.names:
        raise HTTPException(404, "no such checkpoint is served here")
    engine = await engines.get(name)
    return await asyncio.to_thread(_described, engine.model, seed)


def _described(model: MemoryModel, seed: int) -> Checkpoint:
    method, backbone, drawn = model.method, model.method.backbone, model.task.example(seed)
    text, truth = drawn or ("", [])
    example = Example(text=text, questions=[Question(query=query, answer=answer) for query, answer in truth])
    return Checkpoint(
        name=model.name,
        task=model.spec["task"]["name"],
        method=model.spec["method"]["name"],
        write_steps=method.write_steps,
        max_tokens=method.max_context,
        vectors=method.n_mem,
        width=backbone.width,
        token_cache_bytes=backbone.token_cache_bytes,
        calibrated=model.abstain is not None,
        example=example if drawn else None,
    )
