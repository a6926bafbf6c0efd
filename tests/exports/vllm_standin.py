"""What vLLM checks and does, as its documentation says, where vLLM itself cannot be installed.

Prompt embeddings: https://docs.vllm.ai/en/latest/features/prompt_embeds/. Connectors: the abstract methods of
`KVConnectorBase_V1`, and a cache of blocks.
"""

from __future__ import annotations

import base64
import io
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

BASE = "vllm.distributed.kv_transfer.kv_connector.v1.base"
BLOCK = 16


class Refused(ValueError):
    """A request that vLLM answers with an error."""


def received(data: str, width: int, dtype: torch.dtype) -> Tensor:
    """The embeddings of a request, as the server hands them to a model of this width and type.

    Raises
    ------
    Refused
        If the data is no base64 of one tensor that loads without code, with two dimensions, the model's width, and
        floating-point numbers.
    """
    try:
        raw = base64.b64decode(data, validate=True)
        with torch.sparse.check_sparse_tensor_invariants():
            tensor = torch.load(io.BytesIO(raw), weights_only=True, map_location="cpu")
    except Exception as error:
        raise Refused(f"cannot be loaded: {error}") from error
    if not isinstance(tensor, Tensor):
        raise Refused("is no tensor")
    if tensor.layout != torch.strided:
        raise Refused("is sparse")
    if tensor.ndim == 3:
        tensor = tensor.squeeze(0)
    if tensor.ndim != 2:
        raise Refused(f"has {tensor.ndim} dimensions")
    if tensor.shape[1] != width:
        raise Refused(f"has width {tensor.shape[1]}")
    if not tensor.is_floating_point():
        raise Refused(f"has type {tensor.dtype}")
    return tensor.to(dtype)


class KVConnectorMetadata(ABC):  # noqa: B024
    """What the scheduler tells the workers."""


class KVConnectorBase(ABC):
    """The part of `KVConnectorBase_V1` that every connector must implement, and what it inherits."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        self._metadata: Any = None

    def bind_connector_metadata(self, metadata: KVConnectorMetadata) -> None:
        assert isinstance(metadata, KVConnectorMetadata)
        self._metadata = metadata

    def _get_connector_metadata(self) -> Any:
        assert self._metadata is not None
        return self._metadata

    @abstractmethod
    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None: ...

    @abstractmethod
    def wait_for_layer_load(self, layer_name: str) -> None: ...

    @abstractmethod
    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None: ...

    @abstractmethod
    def wait_for_save(self) -> None: ...

    @abstractmethod
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]: ...

    @abstractmethod
    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None: ...

    @abstractmethod
    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata: ...


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `import vllm` find this interface."""
    names = BASE.split(".")
    for count in range(1, len(names) + 1):
        monkeypatch.setitem(sys.modules, ".".join(names[:count]), ModuleType(names[count - 1]))
    base: Any = sys.modules[BASE]
    base.KVConnectorBase_V1, base.KVConnectorMetadata = KVConnectorBase, KVConnectorMetadata
    monkeypatch.delitem(sys.modules, "gradmem.exports.vllm_connector", raising=False)


def config(extra: dict[str, Any], parallel: int = 1) -> Any:
    """The part of vLLM's config that a connector reads."""
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(get_from_extra_config=extra.get),
        parallel_config=SimpleNamespace(tensor_parallel_size=parallel),
        cache_config=SimpleNamespace(block_size=BLOCK),
    )


@dataclass
class Engine:
    """One step of an engine: the scheduler asks the connector, and the worker loads into blocks in any order.

    Parameters
    ----------
    connector : KVConnectorBase
    shape : tuple of int
        Layers, heads and width.
    swapped : bool
        Whether keys and values are the second dimension of a layer's cache.
    """

    connector: Any
    shape: tuple[int, int, int]
    swapped: bool = False

    def load(self, prompt: list[int], computed: int = 0) -> tuple[int, list[tuple[Tensor, Tensor]]]:
        """Positions that need no computation, and the keys and values of each layer (1, heads, positions, width)."""
        request = SimpleNamespace(request_id="one", prompt_token_ids=prompt)
        found, late = self.connector.get_num_new_matched_tokens(request, computed)
        assert not late
        count = -(-len(prompt) // BLOCK)
        blocks = torch.randperm(2 * count, generator=torch.Generator().manual_seed(0))[:count].tolist()
        self.connector.update_state_after_alloc(request, SimpleNamespace(get_block_ids=lambda: (blocks,)), found)
        self.connector.bind_connector_metadata(self.connector.build_connector_meta(None))
        layers, heads, width = self.shape
        sizes = (2 * count, 2) if self.swapped else (2, 2 * count)
        caches = [torch.full((*sizes, BLOCK, heads, width), torch.nan) for _ in range(layers)]
        names = {f"model.layers.{index}.self_attn.attn": one for index, one in enumerate(caches)}
        context = SimpleNamespace(
            no_compile_layers={name: SimpleNamespace(kv_cache=one) for name, one in reversed(names.items())}
        )
        self.connector.start_load_kv(context)
        gathered = []
        for cache in caches:
            halves = cache.transpose(0, 1) if self.swapped else cache
            rows = halves[:, blocks].flatten(1, 2)[:, : computed + found].transpose(1, 2)
            gathered.append((rows[:1], rows[1:]))
        return found, gathered
