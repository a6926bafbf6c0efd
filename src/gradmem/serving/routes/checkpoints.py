"""`/v1/checkpoints`: the checkpoints that are served, with an example of each."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, HTTPException, Query, Request
from pydantic import BaseModel, Field

from ...model import MemoryModel
from ..engine_pool import Pool

router = APIRouter(prefix="/v1/checkpoints", tags=["checkpoints"])


class Checkpoints(BaseModel):
    """The checkpoints that are served, and the largest request."""

    checkpoints: list[str]
    max_body: int = Field(description="Most bytes of a request.")


class Question(BaseModel):
    """A query with its true answer."""

    query: str
    answer: str


class Example(BaseModel):
    """A text to write, and questions about it."""

    text: str
    questions: list[Question]


class Checkpoint(BaseModel):
    """The task of a checkpoint, and the size of its memories."""

    name: str
    task: str
    method: str
    write_steps: int = Field(description="Number of write steps that the checkpoint was trained for.")
    max_tokens: int = Field(description="Most tokens of a context.")
    vectors: int = Field(description="Number of memory vectors; 0 if the memory is not made of vectors.")
    width: int = Field(description="Numbers in each vector.")
    token_cache_bytes: int | None = Field(
        description="Bytes per token of the KV-cache of the backbone; null if it has none."
    )
    calibrated: bool = Field(description="Whether answers have the fields `written` and `abstained`.")
    example: Example | None


@router.get("")
async def checkpoints(request: Request, engines: Pool) -> Checkpoints:
    """List the checkpoints."""
    return Checkpoints(checkpoints=list(engines.names), max_body=request.app.state.settings.max_body)


@router.get("/{name:path}")
async def checkpoint(
    name: str,
    engines: Pool,
    seed: Annotated[int, Query(ge=0, le=2**31 - 1, description="Seed of the example.")] = 0,
) -> Checkpoint:
    """Load and describe a checkpoint, and draw an example of its task."""
    if name not in engines.names:
        raise HTTPException(404, "no such checkpoint is served here")
    engine = await engines.get(name)
    return await asyncio.to_thread(_describe, engine.model, seed)


def _describe(model: MemoryModel, seed: int) -> Checkpoint:
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
