"""Keys and values in a file that the connector in `gradmem.exports.vllm_connector` loads into vLLM.

A safetensors file with `keys` and `values`, shapes (layers, positions, key-value heads, width), and the token ids that
stand for the memory in its metadata.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save

from ..errors import GradmemError, refused
from ..files import write_bytes
from ..model import BoundMemory
from .asking import save_how_to_ask, stand_ins
from .keys_values import keys_values

FORMAT = "gradmem-vllm"
BLOCK = 16
"""Positions of a block of vLLM's cache, by its default; it loads whole blocks only."""


def save_keys_values(memory: BoundMemory, file: Path) -> int:
    """Save the keys and values of a memory, and beside them how to ask it; see `save_how_to_ask`.

    Returns
    -------
    int
        Positions of the memory.

    Raises
    ------
    GradmemError
        If the memory cannot be exported, or its positions do not fill whole blocks.
    """
    found = keys_values(memory)
    if found.entries % BLOCK:
        raise GradmemError(
            f"vLLM loads blocks of {BLOCK} positions, and the memory has {found.entries}: write it with --budget "
            f"{max(1, round(found.entries / BLOCK)) * BLOCK}"
        )
    ids = stand_ins(found, memory)
    tensors = {
        name: part.transpose(1, 2).contiguous().cpu() for name, part in (("keys", found.keys), ("values", found.values))
    }
    write_bytes(file, save(tensors, {"format": FORMAT, "tokens": json.dumps(ids)}))
    save_how_to_ask(memory, ids, file)
    return found.entries


def read_tokens(file: Path) -> list[int] | None:
    """Read the token ids that stand for the memory in a file; None if it is no such file."""
    with refused(f"cannot read {file}"), safe_open(file, "pt") as opened:
        about = opened.metadata() or {}
        return [int(one) for one in json.loads(about["tokens"])] if about.get("format") == FORMAT else None
