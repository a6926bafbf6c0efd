"""A model's own attention, with entries of the cache that single heads do not see, and with an observer.

Heads may keep different numbers of entries. A cache of transformers has room for the same number in every head, so the
places that a head does not use are hidden from it. Masks of transformers hide an entry from all heads.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "gradmem_heads_{}"
"""Name in transformers of an attention implementation with what this module adds."""

Observer = Callable[[nn.Module, Tensor, Tensor, Tensor, dict[str, Any]], None]
"""Receives a layer's attention module, queries (batch, heads, length, width), keys and values, and its options."""

_hidden: ContextVar[Tensor | None] = ContextVar("hidden", default=None)
_observer: ContextVar[Observer | None] = ContextVar("observer", default=None)


@contextmanager
def head_attention(
    model: PreTrainedModel, hidden: Tensor | None = None, observer: Observer | None = None
) -> Iterator[None]:
    """Run a model's attention with hidden entries, an observer, or both.

    Parameters
    ----------
    model : PreTrainedModel
    hidden : Tensor, bool, shape (batch, layers, key-value heads, entries), optional
        True at the first `entries` places of the cache that a head does not see.
    observer : callable, optional
        Called by each layer before it attends.
    """
    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation
    name = NAME.format(before)
    if name not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(name, _interface(before))
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS.get(before, sdpa_mask))
    tokens = _hidden.set(hidden), _observer.set(observer)
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
        _hidden.reset(tokens[0])
        _observer.reset(tokens[1])


def _interface(name: str) -> Callable[..., Any]:
    """The attention implementation of this name, which transformers calls in every layer."""

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> Any:
        if (observer := _observer.get()) is not None:
            observer(module, query, key, value, options)
        if (hidden := _hidden.get()) is not None:
            attention_mask = _masked(attention_mask, hidden[:, module.layer_idx], query, key)
        if name in ALL_ATTENTION_FUNCTIONS:
            plain = ALL_ATTENTION_FUNCTIONS[name]
        else:  # each family of models has its own eager attention
            plain = sys.modules[type(module).__module__].eager_attention_forward
        return plain(module, query, key, value, attention_mask, **options)

    return attend


def _masked(mask: Tensor | None, hidden: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Hide entries (batch, key-value heads, entries) from the query heads that share their keys."""
    length, keys = query.shape[2], key.shape[2]
    if mask is None:
        mask = torch.ones(length, keys, dtype=torch.bool, device=query.device).tril(keys - length)[None, None]
    own = hidden.repeat_interleave(query.shape[1] // hidden.shape[1], 1)[:, :, None]
    mask = mask.expand(len(query), own.shape[1], -1, -1).clone()
    part = mask[..., : own.shape[-1]]
    if mask.dtype == torch.bool:
        part &= ~own
    else:
        part.masked_fill_(own, torch.finfo(mask.dtype).min)
    return mask
