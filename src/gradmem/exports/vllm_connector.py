"""A KV connector of vLLM (`KVConnectorBase_V1`) that loads exported memories, without tensor parallelism.

A prompt that begins with the token ids of a memory gets its keys and values instead of computing them. vLLM loads this
module by name (`kv_connector_module_path`); it needs vLLM to be imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..errors import GradmemError
from .vllm import read_tokens

try:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata
except ImportError as error:
    raise ImportError("gradmem.exports.vllm_connector runs inside of vLLM: pip install vllm") from error

DIRECTORY = "memories"
"""Key of `kv_connector_extra_config`: the directory of exported memories."""


@dataclass(frozen=True)
class Load:
    """Positions `first` and later of a memory, which go to these slots of the cache."""

    file: Path
    first: int
    slots: list[int]


@dataclass
class Loads(KVConnectorMetadata):
    """What the scheduler tells the worker to load before the next step."""

    loads: list[Load] = field(default_factory=list)


class MemoryConnector(KVConnectorBase_V1):
    """Load the memories of a directory.

    Parameters
    ----------
    vllm_config, role, kv_cache_config
        As vLLM gives them.

    Raises
    ------
    GradmemError
        If no directory is configured, or several workers share the heads.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        directory = vllm_config.kv_transfer_config.get_from_extra_config(DIRECTORY, None)
        if directory is None:
            raise GradmemError(
                f'the connector needs a directory: "kv_connector_extra_config": {{"{DIRECTORY}": "DIR"}}'
            )
        if vllm_config.parallel_config.tensor_parallel_size != 1:
            raise GradmemError("the connector does not split heads: run vLLM without tensor parallelism")
        self.directory, self.block = Path(directory), int(vllm_config.cache_config.block_size)
        self.known: dict[Path, list[int] | None] = {}
        self.matched: dict[str, tuple[Path, int]] = {}
        self.loads: list[Load] = []

    # Scheduler

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Count the positions of the prompt's memory that are not in vLLM's cache yet."""
        prompt = list(request.prompt_token_ids or [])
        for file, ids in self._memories():
            count = len(ids)
            if count % self.block == 0 and num_computed_tokens < count < len(prompt) and prompt[:count] == ids:
                self.matched[request.request_id] = file, count
                return count - num_computed_tokens, False
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Remember which slots vLLM gave to a memory."""
        file, count = self.matched.pop(request.request_id, (None, 0))
        if file is None or not num_external_tokens:
            return
        ids, first = blocks.get_block_ids()[0], count - num_external_tokens
        slots = [ids[place // self.block] * self.block + place % self.block for place in range(first, count)]
        self.loads.append(Load(file, first, slots))

    def build_connector_meta(self, scheduler_output: Any) -> Loads:
        """Hand what is to be loaded to the worker."""
        loads, self.loads = self.loads, []
        return Loads(loads)

    def _memories(self) -> Iterator[tuple[Path, list[int]]]:
        """Files of memories with their token ids; each header is read once."""
        for file in sorted(self.directory.glob("*.safetensors")):
            if file not in self.known:
                self.known[file] = read_tokens(file)
            if (ids := self.known[file]) is not None:
                yield file, ids

    # Worker

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Copy keys and values of memories into the cache of every attention layer."""
        for load in self._get_connector_metadata().loads:
            tensors = load_file(load.file)
            for index, cache in _caches(forward_context):
                for part, name in enumerate(("keys", "values")):
                    _put(cache, part, load.slots, tensors[name][index, load.first :])

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: everything was loaded before the step."""

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Do nothing: only `gradmem export` writes memories."""

    def wait_for_save(self) -> None:
        """Do nothing."""


def _caches(forward_context: Any) -> Iterator[tuple[int, Tensor]]:
    """Index of each attention layer in the model, by its name, and its cache."""
    for name, layer in forward_context.no_compile_layers.items():
        cache = getattr(layer, "kv_cache", None)
        if isinstance(cache, list | tuple):  # of older versions, one for each pipeline stage
            cache = cache[forward_context.virtual_engine]
        if cache is not None and (found := re.search(r"\.(\d+)\.", name)):
            yield int(found[1]), cache


def _put(cache: Tensor, part: int, slots: list[int], rows: Tensor) -> None:
    """Write keys (0) or values (1), shape (positions, heads, width), into slots of a layer's cache.

    Its shape is (2, blocks, block size, heads, width), or has the first two swapped.
    """
    if cache.ndim != 5 or 2 not in cache.shape[:2] or cache.shape[3:] != rows.shape[1:]:
        raise GradmemError(f"this vLLM lays its cache out in another way: {tuple(cache.shape)}")
    own = cache[part] if cache.shape[0] == 2 else cache[:, part]
    places = torch.tensor(slots, device=cache.device)
    size = own.shape[1]
    own[places // size, places % size] = rows.to(own)
