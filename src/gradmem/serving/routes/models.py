"""`/v1/models`: the checkpoints and the memories, as OpenAI's clients list them."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel

from ...store import Entry
from ...store.store import PAGE
from ..async_store import OwnStore
from ..engine_pool import Pool
from ..http_errors import Refused
from ..validation import OpenAIRoute

router = APIRouter(prefix="/v1/models", tags=["OpenAI"], route_class=OpenAIRoute)


class Model(BaseModel):
    """A checkpoint, or a memory that can be asked."""

    id: str
    object: str = "model"
    created: int = 0
    owned_by: str = "gradmem"


class Models(BaseModel):
    """The checkpoints and memories of the server."""

    object: str = "list"
    data: list[Model]


def _model(entry: Entry) -> Model:
    return Model(id=f"{entry.model}:{entry.label}", created=int(entry.created.timestamp()))


@router.get("")
async def models(store: OwnStore, engines: Pool) -> Models:
    """List the checkpoints, and the newest memories as `CHECKPOINT:MEMORY`."""
    page = await store.read(lambda s: s.list(limit=PAGE))
    memories = [_model(entry) for entry in page if entry.model in engines.names]
    return Models(data=[*(Model(id=name) for name in engines.names), *memories])


@router.get("/{model:path}")
async def find_model(model: str, store: OwnStore, engines: Pool) -> Model:
    """Describe a checkpoint, or a memory by the name that asks it."""
    if model in engines.names:
        return Model(id=model)
    checkpoint, _, ref = model.partition(":")
    entry = await store.read(lambda s: s.get(ref))
    if entry.model != checkpoint:
        raise not_its_writer(entry.model, checkpoint)
    return _model(entry).model_copy(update={"id": model})


def not_its_writer(writer: str, checkpoint: str) -> Refused:
    """The error of a request that names another checkpoint than the one that wrote the memory."""
    message = f"the memory was written by '{writer}', not by '{checkpoint}'"
    return Refused(404, message, param="model", code="model_not_found")
