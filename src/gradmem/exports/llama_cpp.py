"""A memory as a sequence state of llama.cpp: what `llama_state_seq_load_file` and the slots of its server restore.

The file is little-endian. It holds, one after the other:

- `ggsq`, the version of the format, the number of tokens, and the tokens (int32): ids that stand for the memory;
- the number of streams (1) and of cells, and for each cell its position, the number of its sequences (1) and the
  sequence;
- whether values are transposed (0: as with flash attention), the number of layers, and whether keys and values are
  rotated before they are quantized (0, 0);
- for each layer the type of its keys (1: float16), the bytes of a cell, and the cells; then the same for the values.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..errors import GradmemError
from ..files import write_bytes
from ..model import BoundMemory
from .asking import save_how_to_ask, stand_ins
from .keys_values import KeysValues, keys_values

MAGIC, VERSION = 0x67677371, 4
FLOAT16 = 1
LARGEST = torch.finfo(torch.float16).max
NEIGHBOURS = {"llama": True, "mistral": True, "qwen2": False, "qwen3": False}
"""By the model type of transformers: whether llama.cpp turns neighbours of a key together. Transformers turns the two
halves, and llama.cpp's converter reorders the weights of such models."""
ROPE_TYPES = {"default", "llama3"}
"""Rotary positions that llama.cpp computes as transformers does."""


def save_state(memory: BoundMemory, file: Path) -> int:
    """Save a memory as a sequence state, and beside it how to ask it; see `save_how_to_ask`.

    Parameters
    ----------
    memory : BoundMemory
        Of one row; see `keys_values`.
    file : Path

    Returns
    -------
    int
        Positions of the memory.

    Raises
    ------
    GradmemError
        If the memory cannot be exported, llama.cpp keeps the keys of this model in a way that is not known here, or a
        number is too large for float16.
    """
    turned = _neighbours(memory)
    found = keys_values(memory)
    ids = stand_ins(found, memory)
    write_bytes(file, b"".join(_state(found, ids, turned)))
    save_how_to_ask(memory, ids, file)
    return found.entries


def _neighbours(memory: BoundMemory) -> bool:
    config = memory.model.method.backbone.model.config
    kind, rope = config.model_type, getattr(config, "rope_parameters", None) or {}
    if kind not in NEIGHBOURS:
        raise GradmemError(
            f"how llama.cpp keeps the keys of '{kind}' is not known here, only those of {', '.join(NEIGHBOURS)}"
        )
    if (scaling := rope.get("rope_type", "default")) not in ROPE_TYPES:
        raise GradmemError(f"this model scales its rotary positions ('{scaling}'), which was not tried with llama.cpp")
    return NEIGHBOURS[kind]


def _state(found: KeysValues, ids: list[int], neighbours: bool) -> Iterator[bytes]:
    yield struct.pack(f"<3I{len(ids)}i", MAGIC, VERSION, len(ids), *ids)
    yield struct.pack("<2I", 1, found.entries)
    for position in range(found.entries):
        yield struct.pack("<iIi", position, 1, 0)
    yield struct.pack("<4I", 0, len(found.keys), 0, 0)
    keys = found.keys.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2) if neighbours else found.keys
    for layers in (keys, found.values):
        for layer in layers:
            yield from _cells(layer)


def _cells(layer: Tensor) -> Iterator[bytes]:
    """Keys or values of one layer (heads, entries, width): a cell has those of all heads, one after the other."""
    if float(layer.abs().max()) > LARGEST:
        raise GradmemError("the memory has numbers that float16 cannot hold, which is what llama.cpp keeps")
    cells = layer.detach().cpu().half().transpose(0, 1).flatten(1).contiguous()
    yield struct.pack("<iQ", FLOAT16, cells[0].nbytes)
    yield cells.numpy().astype("<f2").tobytes()
