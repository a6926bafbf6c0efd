"""`/v1/memories`: write, ask, list, inspect, change, append, delete, and memory files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from ...errors import GradmemError
from ...memory import Precision
from ...methods.base import Written
from ...model import MemoryModel
from ...model.abstain import Answer
from ...store import Entry, Version, content_of
from ...store.listing import Filters, labels
from ...store.store import Store
from ..bodies import JsonRoute, Line, Moment, TagLine, Tags, Text, check_header
from ..bodies import Query as Asked
from ..engine_pool import Engines, Served
from ..owned import Owned, OwnedStore
from ..streaming import Following, finite, last, server_sent

router = APIRouter(prefix="/v1/memories", tags=["memories"], route_class=JsonRoute)
FILE = "application/octet-stream"
Number = Annotated[int | None, Query(ge=1, le=2**31 - 1, description="Version; by default the current one.")]


class WriteSteps(BaseModel):
    """How many write steps to take; by default as many as the checkpoint was trained for."""

    steps: int | None = Field(None, ge=0, le=10_000)
    until: float | None = Field(None, gt=0, allow_inf_nan=False, description="Stop at this write loss instead.")
    max_steps: int | None = Field(None, ge=0, le=10_000, description="Most steps that `until` may take.")
    stream: bool = Field(False, description="Answer with server-sent events `step`, then `memory`.")
    tokens: bool = Field(
        False,
        description="Show also, before all else, an event `tokens`, and `token_losses` with each step. What is kept "
        "already is then written once more, to be watched.",
    )

    @property
    def options(self) -> dict[str, Any]:
        """As `MemoryModel.write` takes them."""
        return {"steps": self.steps, "until": self.until, "max_steps": self.max_steps}


class Kept(WriteSteps):
    """How to write a memory, and what it is kept as."""

    checkpoint: Line
    name: Line | None = None
    precision: Precision = "float32"


class NewMemory(Kept):
    """A text to write."""

    text: Text
    tags: Tags = []


class NewFile(Kept):
    """What stands in the address of a text file's upload."""

    tags: TagLine = Field("", description="Tags, as a,b.")


class MoreText(WriteSteps):
    """More text to write into a memory."""

    text: Text
    before: Text | None = Field(None, description="Text that was written before: measures what is still kept of it.")
    may_forget: bool = Field(
        False,
        description="Append also with a checkpoint that was never trained to, which forgets most of what was written.",
    )


class Change(BaseModel):
    """What is to be another; what is not given stays."""

    name: Line | None = Field(None, description="null takes the name away.")
    tags: Tags = Field([], description="In place of those it has.")
    pinned: bool = False


class Queries(BaseModel):
    """Queries to one memory."""

    queries: list[Asked] = Field(min_length=1, max_length=64, fail_fast=True)
    version: int | None = Field(None, ge=1, le=2**31 - 1)


class Answers(BaseModel):
    """Answers in the order of the queries."""

    answers: list[Answer]


class Page(BaseModel):
    """Memories, the newest first."""

    memories: list[Entry]
    next: str | None = Field(description="`after` of the next page; null where there is none.")


class Inspected(BaseModel):
    """All that is known of a memory: versions, and of each row the receipt with its write receipt."""

    memory: Entry
    memory_bytes: int = Field(description="Of the memory itself, in float32; its file has receipts besides.")
    versions: list[Version]
    receipts: list[dict[str, Any]]


@dataclass(frozen=True)
class Step:
    """How far a write has come: steps taken of at most how many, and the mean loss before the next, nats."""

    step: int
    of: int
    loss: float | None


@dataclass(frozen=True)
class SeenStep(Step):
    """The same with the loss of each token under the memory after these steps."""

    token_losses: list[float]


@dataclass(frozen=True)
class Seen:
    """The tokens of the context, as the parts of its text, in the form in which the model reads it."""

    tokens: list[str]


EVENTS = {Seen: "tokens", Step: "step", SeenStep: "step", Entry: "memory"}
Told = Seen | Step | Entry


@router.post("", status_code=201, response_model=Entry)
async def write(wanted: NewMemory, store: Owned, engines: Served) -> Any:
    """Write a text into a memory and keep it; what is kept already is not written again."""
    return await _answered(_write(wanted, store, engines), wanted.stream, 201)


async def _write(wanted: NewMemory, store: OwnedStore, engines: Engines) -> AsyncIterator[Told]:
    engine = await engines.get(wanted.checkpoint)
    options = wanted.options
    content = content_of(engine.model, [wanted.text], precision=wanted.precision, **options)
    about: dict[str, Any] = {"name": wanted.name, "tags": wanted.tags}
    known = await store.change(lambda kept: kept.known(content, **about))
    if known and not wanted.tokens:
        yield known
        return
    following = Following[Told]()
    future = engine.write(wanted.text, on_step=_steps(following, engine.model, wanted), **options)
    async for told in following.until_done(future):
        yield told
    given = {**about, "precision": wanted.precision, "content": content}
    yield await store.change(lambda kept: kept.put(future.result(), **given))


@router.post("/{ref}/append", response_model=Entry)
async def append(ref: str, more: MoreText, store: Owned, engines: Served) -> Any:
    """Write more text into a memory, as its next version."""
    return await _answered(_append(ref, more, store, engines), more.stream, 200)


async def _append(ref: str, more: MoreText, store: OwnedStore, engines: Engines) -> AsyncIterator[Told]:
    entry = await store.read(lambda kept: kept.get(ref))
    engine, memory = await engines.open(store, entry)
    following = Following[Told]()
    options = more.options | {"before": more.before, "may_forget": more.may_forget, "onto": memory}
    future = engine.write(more.text, on_step=_steps(following, engine.model, more), **options)
    async for told in following.until_done(future):
        yield told
    expected = entry.current.number
    yield await store.change(lambda kept: kept.update(entry.id, future.result(), expected=expected))


def _steps(following: Following[Told], model: MemoryModel, wanted: NewMemory | MoreText) -> Any:
    """Tell each step of a write, on the engine's thread, where the model may be used."""
    taken = iter(range(10**9))

    def on_step(written: Written, total: int) -> None:
        loss = float(written.losses[-1].mean()) if len(written.losses) else None
        step = next(taken), total - 1, loss
        if wanted.tokens:
            if step[0] == 0:
                following.tell(Seen(model.task.pieces(model.task.context_text(wanted.text))))
            following.tell(SeenStep(*step, model.token_losses(written.memory, wanted.text)))
        else:
            following.tell(Step(*step))

    return on_step


async def _answered(items: AsyncIterator[Told], stream: bool, status: int) -> Any:
    """The entry that a write ends with, or all of it as events."""
    if not stream:
        return await last(items)
    named = ((EVENTS[type(item)], item) async for item in items)
    response = await server_sent(named)
    response.status_code = status
    return response


@router.post("/{ref}/ask", response_model=Answers)
async def ask(ref: str, asked: Queries, store: Owned, engines: Served) -> Any:
    """Answer queries from a memory alone, each with what speaks for the answer."""
    engine, memory, key = await opened(ref, store, engines, asked.version)
    futures: list[asyncio.Future[Answer]] = []
    try:
        for query in asked.queries:
            futures.append(asyncio.wrap_future(engine.ask(key, memory, query)))
        return {"answers": await asyncio.gather(*futures)}
    finally:
        for future in futures:
            future.cancel()


async def opened(ref: str, store: OwnedStore, engines: Engines, version: int | None = None) -> Any:
    """The engine of a memory, the memory, and the key that it has there."""
    entry = await store.read(lambda kept: kept.get(ref))
    engine, memory = await engines.open(store, entry, version)
    return engine, memory, (entry.id, version or entry.current.number)


@router.get("")
async def list_memories(
    store: Owned,
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
    after: Line | None = None,
    checkpoint: Line | None = None,
    name: Annotated[Line | None, Query(description="Name, or its beginning and a *.")] = None,
    tags: Annotated[TagLine, Query(description="Tags that it must have, as a,b.")] = "",
    since: Moment | None = None,
    until: Moment | None = None,
) -> Page:
    """List memories, the newest first."""
    filters = Filters(checkpoint=checkpoint, name=name, tags=tags, since=since, until=until)
    page = await store.read(lambda kept: kept.list(limit=limit, after=after, **filters))
    return Page(memories=list(page), next=page[-1].cursor if len(page) == limit else None)


@router.get("/{ref}", response_model=Inspected)
async def inspect(ref: str, store: Owned) -> Any:
    """Show a memory, its versions, and what the current one kept."""

    def inspected(kept: Store) -> Response:
        entry = kept.get(ref)
        memory = kept.load(entry.id, entry.current.number)
        shown = {
            "memory": entry.to_dict(),
            "memory_bytes": memory.nbytes,
            "versions": [version.to_dict() for version in kept.versions(entry.id)],
            "records": [receipt.to_dict() for receipt in memory.receipts],
        }
        return JSONResponse(finite(shown))

    return await store.read(inspected)


@router.patch("/{ref}")
async def change(ref: str, wanted: Change, store: Owned) -> Entry:
    """Rename a memory, tag it, or pin it, which keeps it from being deleted."""
    return await store.change(lambda kept: kept.change(ref, **wanted.model_dump(exclude_unset=True)))


@router.delete("/{ref}", status_code=204)
async def delete(ref: str, store: Owned) -> None:
    """Delete a memory with all its versions."""
    await store.change(lambda kept: kept.delete(ref))


@router.get("/{ref}/file", response_class=Response, responses={200: {"content": {FILE: {}}}})
async def download(ref: str, store: Owned, version: Number = None) -> Response:
    """The memory file."""
    data = await store.read(lambda kept: kept.read(ref, version))
    headers = {"Content-Disposition": 'attachment; filename="memory.safetensors"'}
    return Response(data, media_type=FILE, headers=headers)


def _body(kind: str, **schema: str) -> dict[str, Any]:
    """A body that is no JSON, for the OpenAPI document."""
    return {"requestBody": {"required": True, "content": {kind: {"schema": {"type": "string", **schema}}}}}


@router.post("/texts", status_code=201, response_model=Entry, openapi_extra=_body("text/plain"))
async def upload_text(request: Request, about: Annotated[NewFile, Query()], store: Owned, engines: Served) -> Any:
    """Write a text file, its bytes as the body, in UTF-8."""
    try:
        text = (await request.body()).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise GradmemError(f"the text is not UTF-8: byte {error.start} cannot be read") from error
    given = {**about.model_dump(), "text": text, "tags": labels(about.tags)}
    return await write(NewMemory.model_construct(**given), store, engines)


@router.post("/files", status_code=201, openapi_extra=_body(FILE, format="binary"))
async def upload(
    request: Request,
    store: Owned,
    name: Line | None = None,
    tags: Annotated[TagLine, Query(description="Tags, as a,b.")] = "",
) -> Entry:
    """Keep a memory file, as it is; nothing in it is executed."""
    data = await request.body()
    check_header(data)
    return await store.change(lambda kept: kept.put(data, name=name, tags=tags))
