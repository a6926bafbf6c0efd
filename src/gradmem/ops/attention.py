"""Softmax attention with a closed-form gradient and second derivative, for any Hugging Face model.

Meta-training differentiates through gradients. PyTorch's fused attention has no second derivative. Differentiating
eager attention twice makes dozens of passes over matrices of queries times keys and keeps most of them. Here the
forward pass, its gradient and the derivative of that gradient are written out. All three work on tiles of a few query
rows and skip the keys that causality hides from a tile. They keep nothing of the size of the matrix; each computes the
probabilities again. Select it with `model.set_attn_implementation("gradmem")` after importing this module.

The formulas are for one head with keys K, values V and queries Q that are already scaled:

    S = Q K^T,  P = softmax(S),  O = P V                                          forward
    dP = dO V^T,  D = rowsum(P * dP),  dS = P * (dP - D)                          gradient
    dQ = dS K,  dK = dS^T Q,  dV = P^T dO

and for cotangents a, b, c of dQ, dK, dV (J = <a, dQ> + <b, dK> + <c, dV>):

    G = a K^T + Q b^T                 dJ/d(dS)                                    second derivative
    H = P * (G - rowsum(P * G))       dJ/d(dP)
    Y = H * (dP - D) + P * (dO c^T)
    Z = Y - P * rowsum(Y)             dJ/dS
    dJ/dQ = Z K + dS b,  dJ/dK = Z^T Q + dS^T a,  dJ/dV = H^T dO,  dJ/d(dO) = H V + P c
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ..errors import GradmemError
from .attention_tiles import Tiles
from .dtypes import no_autocast, product_dtype, work_dtype

NAME = "gradmem"
"""Name of the implementation in transformers."""


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, scaling: float, mask: Tensor | None = None, causal: bool = True
) -> Tensor:
    """Compute softmax attention; can be differentiated twice.

    Parameters
    ----------
    query : Tensor, shape (batch, heads, queries, d)
    key : Tensor, shape (batch, key heads, keys, d)
        Each key head serves `heads / key heads` neighbouring query heads.
    value : Tensor, shape (batch, key heads, keys, e)
    scaling : float
        Factor on the scores.
    mask : Tensor, shape (batch or 1, heads or 1, queries, keys), optional
        Boolean, true where a query sees a key, or a number to add to the score. With a mask, `causal` has no effect. A
        query that sees no key averages all values.
    causal : bool
        Query i sees the keys up to `keys - queries + i`: the last query is at the last key.

    Returns
    -------
    Tensor, shape (batch, queries, heads, e)
    """
    batch, heads, queries, _ = query.shape
    key_heads, keys = key.shape[1:3]
    if heads % key_heads:
        raise ValueError(f"{heads} query heads cannot share {key_heads} key heads")
    if mask is not None:
        shape = (batch, heads, queries, keys)
        fits = mask.dim() == 4 and mask.shape[0] in (1, batch) and mask.shape[1] in (1, heads)
        if not fits or mask.shape[2:] != shape[2:]:
            raise ValueError(f"an attention mask of shape {tuple(mask.shape)} does not fit scores of shape {shape}")
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ValueError(f"an attention mask is boolean or a number to add, not {mask.dtype}")
        if mask.requires_grad:
            raise ValueError("gradmem attention has no gradient for its mask")
    elif causal and queries > keys:
        raise ValueError(f"{queries} causal queries cannot be the last of {keys} keys")

    dtype = product_dtype(query)
    query, key, value = (tensor.to(dtype) for tensor in (query * scaling, key, value))
    out: Tensor = _Attention.apply(query, key, value, mask, causal and mask is None)
    return out.transpose(1, 2)


class _Attention(torch.autograd.Function):
    """Map scaled queries, keys and values to outputs, all of shape (batch, heads, length, d)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.causal = causal
        batch, heads, queries, _ = query.shape
        out = query.new_empty(batch, queries, heads, value.shape[-1]).transpose(1, 2)
        with no_autocast(query):
            for tile in Tiles(query, key, mask, causal):
                p = tile.probabilities(tile.rows(query), tile.keys(key))
                tile.set_rows(out, (tile.low(p), tile.keys(value)))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_Gradient.apply(grad, *ctx.saved_tensors, ctx.causal), None, None


class _Gradient(torch.autograd.Function):
    """The gradient of `_Attention` as a function of the output's gradient, queries, keys and values."""

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        work = work_dtype(query)
        d_query = torch.empty_like(query)
        d_key, d_value = torch.zeros_like(key, dtype=work), torch.zeros_like(value, dtype=work)
        mean = query.new_empty(*query.shape[:-1], 1, dtype=work)  # D
        with no_autocast(query):
            for tile in Tiles(query, key, mask, causal):
                q, k, v, do = tile.rows(query), tile.keys(key), tile.keys(value), tile.rows(grad)
                p = tile.probabilities(q, k)
                ds = tile.product(1, (do, v.mT)).mul_(p)
                d = ds.sum(-1, keepdim=True)
                ds.addcmul_(p, d, value=-1)
                tile.write_rows(mean, d)
                p, ds = tile.low(p), tile.low(ds)
                tile.set_rows(d_query, (ds, k))
                tile.add_keys(d_key, (ds.mT, q))
                tile.add_keys(d_value, (p.mT, do))
        ctx.save_for_backward(grad, query, key, value, mask, mean)
        ctx.causal = causal
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype)

    @staticmethod
    def backward(ctx: Any, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor | None, ...]:
        return *_SecondDerivative.apply(a, b, c, *ctx.saved_tensors, ctx.causal), None, None


class _SecondDerivative(torch.autograd.Function):
    """The derivative of `_Gradient` with respect to its tensors, given cotangents a, b, c of its results."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        mean: Tensor,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        work = work_dtype(query)
        d_grad, d_query = torch.empty_like(grad), torch.empty_like(query)
        d_key, d_value = torch.zeros_like(key, dtype=work), torch.zeros_like(value, dtype=work)
        with no_autocast(query):
            for tile in Tiles(query, key, mask, causal):
                q, k, v, do = tile.rows(query), tile.keys(key), tile.keys(value), tile.rows(grad)
                to_dq, to_dk, to_dv = tile.rows(a), tile.keys(b), tile.keys(c)
                p = tile.probabilities(q, k)
                dp = tile.product(1, (do, v.mT)).sub_(tile.rows(mean))
                h = tile.product(2, (to_dq, k.mT), (q, to_dk.mT)).mul_(p)
                h.addcmul_(p, h.sum(-1, keepdim=True), value=-1)
                z = tile.product(3, (do, to_dv.mT)).mul_(p).addcmul_(h, dp)
                z.addcmul_(p, z.sum(-1, keepdim=True), value=-1)
                p, ds, h, z = (tile.low(x) for x in (p, dp.mul_(p), h, z))
                tile.set_rows(d_grad, (h, v), (p, to_dv))
                tile.set_rows(d_query, (z, k), (ds, to_dk))
                tile.add_keys(d_key, (z.mT, q), (ds.mT, to_dq))
                tile.add_keys(d_value, (h.mT, do))
        return d_grad, d_query, d_key.to(key.dtype), d_value.to(value.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        # `once_differentiable` does not raise if another path leads to the inputs.
        raise RuntimeError("gradmem attention has no third derivative: use eager attention")


def _attention_interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute attention as transformers calls it, in place of its eager attention."""
    if dropout > 0 and module.training:
        raise GradmemError("gradmem attention has no dropout: set the attention dropout of the backbone to 0")
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise GradmemError(f"gradmem attention has no {name}: use a backbone without it, or eager attention")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    # Without a mask a module is causal unless it says otherwise: `_mask_interface` drops causal masks only.
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    return attention(query, key, value, scaling=scaling, mask=attention_mask, causal=causal), None


def _mask_interface(
    *,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **options: Any,
) -> Tensor | None:
    """Build the boolean mask, or None if it is the causal one, which `attention` applies by itself."""
    plain = mask_function is causal_mask_function or (local_size is not None and kv_length < local_size)
    # With a static cache, there are keys after the last query.
    aligned = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    if allow_is_causal_skip and plain and aligned:
        seen = None if attention_mask is None else attention_mask[:, kv_offset : kv_offset + kv_length]
        if seen is None or (seen.shape[1] == kv_length and bool(seen.all())):
            return None
    options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: Tensor = sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        **options,
    )
    return mask


AttentionInterface.register(NAME, _attention_interface)
AttentionMaskInterface.register(NAME, _mask_interface)
