"""A memory of vectors as prompt embeddings: the tensor that vLLM takes in a request, and the lists that SGLang takes.

Neither server puts a question behind embeddings by itself, so `prompt_embeds` makes one tensor of the two.
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor

from ..errors import GradmemError
from ..files import write_bytes
from ..methods.base import Method
from ..methods.base.prefix_method import PrefixMethod
from ..methods.vectors import Vectors
from ..model import BoundMemory
from ..tasks.base import Conversation


def has_vectors(method: Method) -> TypeGuard[PrefixMethod | Vectors]:
    """Whether a method's memories are vectors before the prompt, as those of gradmem, cram, rmt and vectors."""
    return isinstance(method, Vectors) or (isinstance(method, PrefixMethod) and method.form is None)


@torch.no_grad()
def memory_embeds(memory: BoundMemory) -> Tensor:
    """Build the embeddings that READ puts before a question: projected vectors and control vectors.

    Parameters
    ----------
    memory : BoundMemory
        Of one row.

    Returns
    -------
    Tensor, shape (positions, d)
        On the CPU, in the type of the model's weights.

    Raises
    ------
    GradmemError
        If the memory has several rows, is not made of vectors, or has numbers that are not finite.
    """
    method = memory.model.method
    if not has_vectors(method):
        raise GradmemError("the memory is keys and values, not vectors before the prompt: export it as such")
    if len(memory) != 1:
        raise GradmemError(f"the memory has {len(memory)} rows, and an export holds one: take one row alone")
    embeds, _ = method.inputs(memory)
    if not bool(embeds.isfinite().all()):
        raise GradmemError("the memory has numbers that are not finite: write it again")
    return embeds[0].cpu()


@torch.no_grad()
def prompt_embeds(memory: BoundMemory, question: str | Conversation) -> Tensor:
    """Build the embeddings of a whole prompt: those of the memory, and behind them those of a question.

    Parameters
    ----------
    memory : BoundMemory
        Of one row.
    question : str or list of dict
        As for `BoundMemory.ask`, or the messages of a conversation.

    Returns
    -------
    Tensor, shape (positions, d)
        On the CPU, in the type of the model's weights.

    Raises
    ------
    GradmemError
        As `memory_embeds`; or if the question is empty or too long, or has unknown characters.
    """
    before = memory_embeds(memory)
    return _joined(before, memory, memory.model.encoder.query_ids(question, None, len(before)))


@torch.no_grad()
def embedded(memory: BoundMemory, ids: list[int]) -> Tensor:
    """Build the embeddings of a whole prompt whose question is tokenized already; see `prompt_embeds`."""
    return _joined(memory_embeds(memory), memory, ids)


def _joined(before: Tensor, memory: BoundMemory, ids: list[int]) -> Tensor:
    embeds = memory.model.method.backbone.embed(torch.tensor(ids, device=memory.model.device))
    return torch.cat([before, embeds.cpu()])


def to_base64(embeds: Tensor) -> str:
    """Encode a tensor as a request to vLLM carries it: `prompt_embeds` of a completion, `data` of a content part."""
    return base64.b64encode(_saved(embeds)).decode("ascii")


def save_tensor(memory: BoundMemory, file: Path) -> int:
    """Save the embeddings of a memory with `torch.save`, for vLLM; return their number.

    Raises
    ------
    GradmemError
        As `memory_embeds`, or if the file cannot be written.
    """
    embeds = memory_embeds(memory)
    write_bytes(file, _saved(embeds))
    return len(embeds)


def save_lists(memory: BoundMemory, file: Path) -> int:
    """Save the embeddings of a memory as a JSON list of lists, for SGLang; return their number.

    Raises
    ------
    GradmemError
        As `memory_embeds`, or if the file cannot be written.
    """
    embeds = memory_embeds(memory).tolist()
    write_bytes(file, json.dumps(embeds).encode())
    return len(embeds)


def _saved(embeds: Tensor) -> bytes:
    file = io.BytesIO()
    torch.save(embeds.detach().cpu().clone(memory_format=torch.contiguous_format), file)
    return file.getvalue()
