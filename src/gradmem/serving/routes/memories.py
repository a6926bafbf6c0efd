"""`/v1/memories`: write, append, ask, list, inspect, change and delete memories, and transfer memory files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from itertools import count
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from ...errors import GradmemError
from ...methods.base import Written
from ...model import Answer, MemoryModel
from ...store import Entry, content_hash
from ...store.listing import Filters, labels
from ...store.store import Store
from ..async_store import AsyncStore, OwnStore
from ..engine_pool import EnginePool, Pool
from ..streaming import ProgressStream, finite, last, server_sent
from ..validation import JsonRoute, Line, Moment, TagLine, check_header
from .memory_schemas import (
    EVENT_NAMES,
    Answers,
    Change,
    ContextTokens,
    Inspected,
    MoreText,
    NewMemory,
    Page,
    Queries,
    Step,
    StepWithTokens,
    TextFileOptions,
    WriteEvent,
)

router = APIRouter(prefix="/v1/memories", tags=["memories"], route_class=JsonRoute)
FILE = "application/octet-stream"
Number = Annotated[int | None, Query(ge=1, le=2**31 - 1, description="Version; by default the current one.")]


@router.post("", status_code=201, response_model=Entry)
async def write(wanted: NewMemory, store: OwnStore, engines: Pool) -> Any:
    """Write a text into a memory and store it. A text that is stored already is not written again."""
    return await _answer(_write(wanted, store, engines), wanted.stream, 201)


async def _write(wanted: NewMemory, store: AsyncStore, engines: EnginePool) -> AsyncIterator[WriteEvent]:
    engine = await engines.get(wanted.checkpoint)
    options = wanted.options
    content = content_hash(engine.model, [wanted.text], precision=wanted.precision, **options)
    labelled: dict[str, Any] = {"name": wanted.name, "tags": wanted.tags}
    stored = await store.change(lambda s: s.reuse(content, **labelled))
    if stored and not wanted.tokens:
        yield stored
        return
    progress = ProgressStream[WriteEvent]()
    future = engine.write(wanted.text, on_step=_publish_steps(progress, engine.model, wanted), **options)
    async for event in progress.events(future):
        yield event
    given = {**labelled, "precision": wanted.precision, "content": content}
    yield await store.change(lambda s: s.put(future.result(), **given))


@router.post("/{ref}/append", response_model=Entry)
async def append(ref: str, more: MoreText, store: OwnStore, engines: Pool) -> Any:
    """Write more text into a memory, as its next version."""
    return await _answer(_append(ref, more, store, engines), more.stream, 200)


async def _append(ref: str, more: MoreText, store: AsyncStore, engines: EnginePool) -> AsyncIterator[WriteEvent]:
    entry = await store.read(lambda s: s.get(ref))
    engine, memory = await engines.open(store, entry)
    progress = ProgressStream[WriteEvent]()
    model = memory.model
    options = more.options | {"before": more.before, "may_forget": more.may_forget, "model": model, "onto": memory}
    future = engine.write(more.text, on_step=_publish_steps(progress, model, more), **options)
    async for event in progress.events(future):
        yield event
    expected = entry.current.number
    yield await store.change(lambda s: s.update(entry.id, future.result(), expected=expected))


def _publish_steps(
    progress: ProgressStream[WriteEvent], model: MemoryModel, wanted: NewMemory | MoreText
) -> Callable[[Written, int], None]:
    """Make the callback that publishes each step; it runs on the engine's thread, which may use the model."""
    steps = count()

    def on_step(written: Written, total: int) -> None:
        loss = float(written.losses[-1].mean()) if len(written.losses) else None
        step = next(steps), total - 1, loss
        if wanted.tokens:
            if step[0] == 0:
                progress.publish(ContextTokens(model.task.pieces(model.task.context_text(wanted.text))))
            progress.publish(StepWithTokens(*step, model.token_losses(written.memory, wanted.text)))
        else:
            progress.publish(Step(*step))

    return on_step


async def _answer(events: AsyncIterator[WriteEvent], stream: bool, status: int) -> Any:
    """Answer with the stored entry, which is the last event, or with all events."""
    if not stream:
        return await last(events)
    named = ((EVENT_NAMES[type(event)], event) async for event in events)
    response = await server_sent(named)
    response.status_code = status
    return response


@router.post("/{ref}/ask", response_model=Answers)
async def ask(ref: str, asked: Queries, store: OwnStore, engines: Pool) -> Any:
    """Answer queries from a memory alone. Each answer comes with its log-probability and other evidence."""
    engine, memory, key = await open_memory(ref, store, engines, asked.version)
    futures: list[asyncio.Future[Answer]] = []
    try:
        for query in asked.queries:
            futures.append(asyncio.wrap_future(engine.ask(key, memory, query)))
        return {"answers": await asyncio.gather(*futures)}
    finally:
        for future in futures:
            future.cancel()


async def open_memory(ref: str, store: AsyncStore, engines: EnginePool, version: int | None = None) -> Any:
    """Return the engine of a memory, the memory, and its key in the engine's prefix cache."""
    entry = await store.read(lambda s: s.get(ref))
    engine, memory = await engines.open(store, entry, version)
    return engine, memory, (entry.id, version or entry.current.number)


@router.get("")
async def list_memories(
    store: OwnStore,
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
    after: Annotated[Line | None, Query(description="`next` of the previous page.")] = None,
    checkpoint: Annotated[Line | None, Query(description="Name or fingerprint of the checkpoint.")] = None,
    name: Annotated[Line | None, Query(description="Name, or the beginning of a name followed by *.")] = None,
    tags: Annotated[TagLine, Query(description="Tags that the memory must have, separated by commas.")] = "",
    since: Annotated[Moment | None, Query(description="Earliest time of creation.")] = None,
    until: Annotated[Moment | None, Query(description="Time before which the memory was created.")] = None,
) -> Page:
    """List memories, the newest first; by name if `name` is the beginning of one."""
    filters = Filters(checkpoint=checkpoint, name=name, tags=tags, since=since, until=until)
    page = await store.read(lambda s: s.list(limit=limit, after=after, **filters))
    return Page(memories=list(page), next=page[-1].cursor if len(page) == limit else None)


@router.get("/{ref}", response_model=Inspected)
async def inspect(ref: str, store: OwnStore) -> Any:
    """Show a memory, its versions, and the write receipts of the current version."""

    def inspected(s: Store) -> Response:
        entry = s.get(ref)
        memory = s.load(entry.id, entry.current.number)
        shown = {
            "memory": entry.to_dict(),
            "memory_bytes": memory.nbytes,
            "versions": [version.to_dict() for version in s.versions(entry.id)],
            "receipts": [receipt.to_dict() for receipt in memory.receipts],
        }
        return JSONResponse(finite(shown))

    return await store.read(inspected)


@router.patch("/{ref}")
async def change(ref: str, wanted: Change, store: OwnStore) -> Entry:
    """Rename, tag or pin a memory. A pinned memory cannot be deleted."""
    return await store.change(lambda s: s.change(ref, **wanted.model_dump(exclude_unset=True)))


@router.delete("/{ref}", status_code=204)
async def delete(ref: str, store: OwnStore) -> None:
    """Delete a memory with all its versions."""
    await store.change(lambda s: s.delete(ref))


@router.get("/{ref}/file", response_class=Response, responses={200: {"content": {FILE: {}}}})
async def download(ref: str, store: OwnStore, version: Number = None) -> Response:
    """Download the memory file."""
    data = await store.read(lambda s: s.read(ref, version))
    headers = {"Content-Disposition": 'attachment; filename="memory.safetensors"'}
    return Response(data, media_type=FILE, headers=headers)


def _raw_body(media_type: str, **schema: str) -> dict[str, Any]:
    """Describe a body that is not JSON, for the OpenAPI document."""
    return {"requestBody": {"required": True, "content": {media_type: {"schema": {"type": "string", **schema}}}}}


@router.post("/texts", status_code=201, response_model=Entry, openapi_extra=_raw_body("text/plain"))
async def upload_text(
    request: Request, options: Annotated[TextFileOptions, Query()], store: OwnStore, engines: Pool
) -> Any:
    """Write a text file. The body is the file, in UTF-8."""
    try:
        text = (await request.body()).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise GradmemError(f"the text is not UTF-8: byte {error.start} cannot be read") from error
    given = {**options.model_dump(), "text": text, "tags": labels(options.tags)}
    return await write(NewMemory.model_construct(**given), store, engines)


@router.post("/files", status_code=201, openapi_extra=_raw_body(FILE, format="binary"))
async def upload(
    request: Request,
    store: OwnStore,
    name: Line | None = None,
    tags: Annotated[TagLine, Query(description="Tags, separated by commas.")] = "",
) -> Entry:
    """Store a memory file as it is. Nothing in it is executed."""
    data = await request.body()
    check_header(data)
    return await store.change(lambda s: s.put(data, name=name, tags=tags))
