"""Softmax attention with a closed-form gradient and second derivative, for any Hugging Face model.

Meta-training differentiates through gradients. PyTorch's fused attention has no second derivative, and differentiating
the eager one twice makes dozens of passes over matrices of queries times keys and keeps most of them. Here the forward
pass, its gradient and the derivative of that gradient are written out. All three work on tiles of a few query rows,
skip the keys that causality hides from a tile, and keep nothing of the size of the matrix: each computes the
probabilities anew. Select it by name, `model.set_attn_implementation("gradmem")`, after importing this module.

In the formulas below, for one head with keys K, values V and queries Q that are already scaled:

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

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ..errors import GradmemError
from .dtypes import no_autocast, product_dtype, work_dtype
from .workspace import elements_at_once

NAME = "gradmem"
"""Name of the implementation in transformers."""

TILE_ROWS = 64
"""Query rows of a tile on a CPU. Fewer skip more of the causal triangle; more make the matrix products efficient."""
TILE_BYTES = 2**20
"""Scores of a tile on a CPU, in the type of the products and for each thread. More leave the cache; with fewer, calling
the operations costs too much."""
TILE_ROWS_ELSEWHERE, TILE_SHARE = 2048, 64
"""Rows on a GPU, and the share of its memory that a tile's scores take: launching many small kernels costs more there
than the half of the products that causality would spare."""


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, scaling: float, mask: Tensor | None = None, causal: bool = True
) -> Tensor:
    """Softmax attention that can be differentiated twice.

    Parameters
    ----------
    query : Tensor, shape (batch, heads, queries, d)
    key : Tensor, shape (batch, key heads, keys, d)
        Each key head serves `heads / key heads` neighbouring query heads.
    value : Tensor, shape (batch, key heads, keys, e)
    scaling : float
        Factor on the scores.
    mask : Tensor, shape (batch or 1, heads or 1, queries, keys), optional
        Boolean, true where a query sees a key, or a number to add to the score. It alone decides: with a mask,
        `causal` has no effect. A query that sees no key averages all values.
    causal : bool
        Query i sees the keys up to `keys - queries + i`: the last query stands at the last key.

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
    """Scaled queries, keys, values -> outputs, all of shape (batch, heads, length, d)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.causal = causal
        batch, heads, queries, _ = query.shape
        out = query.new_empty(batch, queries, heads, value.shape[-1]).transpose(1, 2)
        with no_autocast(query):
            for tile in _Tiles(query, key, mask, causal):
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
            for tile in _Tiles(query, key, mask, causal):
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
            for tile in _Tiles(query, key, mask, causal):
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
        # Not `once_differentiable`, which `torch.autograd.grad` passes by where another path leads to its inputs.
        raise RuntimeError("gradmem attention has no third derivative: use eager attention")


class _Tiles:
    """The tiles of an attention matrix, in order, and the scratch memory that they share.

    The query heads that share a key head, and the positions of a tile, are rows of one matrix: keys are never repeated.

    Parameters
    ----------
    query : Tensor, shape (batch, heads, queries, d)
    key : Tensor, shape (batch, key heads, keys, d)
    mask : Tensor, optional, shape (batch or 1, heads or 1, queries, keys)
    causal : bool
    """

    def __init__(self, query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> None:
        self.batch, self.heads, self.keys, _ = key.shape
        self.queries = query.shape[2]
        self.groups = query.shape[1] // self.heads
        self.causal = causal
        self.dtype, self.work, self.device = query.dtype, work_dtype(query), query.device
        self.mask = None if mask is None else self.grouped(mask)
        self.slots: dict[int, Tensor] = {}
        cpu = query.device.type == "cpu"
        rows = TILE_ROWS if cpu else TILE_ROWS_ELSEWHERE
        size = TILE_BYTES * torch.get_num_threads()
        size = size if cpu else 4 * elements_at_once(query.device, TILE_BYTES, TILE_SHARE)
        # Bytes of one position in one key head. Where all samples and heads fit, tiles grow taller.
        line = self.groups * self.keys * query.element_size()
        tall = max(rows // self.groups, size // max(1, line * self.batch * self.heads))
        self.tall = max(1, min(tall, self.queries))
        matrices = max(1, size // (self.tall * line))
        # Whole samples, or some heads of a single one.
        self.wide = _share(self.heads, matrices)
        self.deep = _share(self.batch, matrices // self.heads)
        hidden = torch.full((self.tall, self.tall), -torch.inf, dtype=self.work, device=self.device)
        self.triangle = hidden.triu_(1)[:, None]

    def __iter__(self) -> Iterator[_Tile]:
        for batch in _slices(self.batch, self.deep):
            for heads in _slices(self.heads, self.wide):
                for positions in _slices(self.queries, self.tall):
                    width = self.keys - self.queries + positions.stop if self.causal else self.keys
                    yield _Tile(self, batch, heads, positions, width)

    def grouped(self, tensor: Tensor) -> Tensor:
        """A view (batch, heads, positions, x) -> (batch, key heads, positions, groups, x); 1 head stays 1."""
        if tensor.shape[1] == 1:
            return tensor.unsqueeze(3)
        return tensor.unflatten(1, (self.heads, self.groups)).transpose(2, 3)

    def scratch(self, slot: int, shape: tuple[int, ...]) -> Tensor:
        """Uninitialised work memory; a slot holds one matrix at a time."""
        size = math.prod(shape)
        if slot not in self.slots or self.slots[slot].numel() < size:
            whole = self.deep * self.wide * self.tall * self.groups * self.keys
            self.slots[slot] = torch.empty(max(size, whole), dtype=self.work, device=self.device)
        return self.slots[slot][:size].view(shape)


class _Tile:
    """Some query positions of some samples and key heads, with the keys that they may see: a batch of matrices.

    Parameters
    ----------
    owner : _Tiles
    batch, heads, positions : slice
    width : int
        The number of keys, from the first.
    """

    def __init__(self, owner: _Tiles, batch: slice, heads: slice, positions: slice, width: int) -> None:
        self.owner, self.width = owner, width
        self.some_rows, self.some_keys = (batch, heads, positions), (batch, heads, slice(width))

    def rows(self, tensor: Tensor) -> Tensor:
        """The tile's part of a tensor of queries, as contiguous matrices (matrices, rows, d)."""
        part = self.owner.grouped(tensor)[self.some_rows]
        # oneDNN, which multiplies in low precision on CPUs, would copy a strided operand for every product.
        return part.reshape(part.shape[0] * part.shape[1], -1, part.shape[4]).contiguous()

    def keys(self, tensor: Tensor) -> Tensor:
        """The tile's part of a tensor of keys, as contiguous matrices (matrices, keys, d)."""
        return tensor[self.some_keys].flatten(0, 1).contiguous()

    def set_rows(self, tensor: Tensor, *pairs: tuple[Tensor, Tensor]) -> None:
        """Write a sum of matrix products to the tile's part of a tensor of queries."""
        self.write_rows(tensor, self.product(4, *pairs))

    def write_rows(self, tensor: Tensor, matrices: Tensor) -> None:
        """Write to the tile's part of a tensor of queries."""
        part = self.owner.grouped(tensor)[self.some_rows]
        part.copy_(matrices.view(part.shape))

    def add_keys(self, tensor: Tensor, *pairs: tuple[Tensor, Tensor]) -> None:
        """Add a sum of matrix products to the tile's part of a tensor of keys."""
        part = tensor[self.some_keys]
        part.add_(self.product(4, *pairs).view(part.shape))

    def product(self, slot: int, *pairs: tuple[Tensor, Tensor]) -> Tensor:
        """Sum of matrix products, in scratch memory; summed in at least float32."""
        left, right = pairs[0]
        out = self.owner.scratch(slot, (left.shape[0], left.shape[1], right.shape[2]))
        if left.dtype == out.dtype:
            torch.bmm(left, right, out=out)
            for left, right in pairs[1:]:
                out.baddbmm_(left, right)
            return out
        out.copy_(torch.bmm(left, right))
        for left, right in pairs[1:]:
            out.add_(self.owner.scratch(5, out.shape).copy_(torch.bmm(left, right)))
        return out

    def low(self, tensor: Tensor) -> Tensor:
        """A matrix in the type of the products."""
        return tensor.to(self.owner.dtype)

    def probabilities(self, query: Tensor, key: Tensor) -> Tensor:
        """P, in slot 0; slot 1 is overwritten."""
        owner, (batch, heads, positions) = self.owner, self.some_rows
        scores = self.product(1, (query, key.mT))
        count = positions.stop - positions.start
        if owner.mask is not None:
            whole = slice(None)
            mask = owner.mask[
                batch if owner.mask.shape[0] > 1 else whole, heads if owner.mask.shape[1] > 1 else whole, positions
            ]
            parts = scores.view(batch.stop - batch.start, -1, count, owner.groups, self.width)
            if mask.dtype == torch.bool:
                # Not minus infinity: the softmax of a row that sees nothing would be NaN.
                parts.masked_fill_(~mask, torch.finfo(scores.dtype).min)
            else:
                parts.add_(mask)
        elif owner.causal and count > 1:
            parts = scores.view(-1, count, owner.groups, self.width)
            parts[..., self.width - count :].add_(owner.triangle[:count, :, :count])
        return torch.softmax(scores, -1, out=owner.scratch(0, scores.shape))


def _share(size: int, limit: int) -> int:
    """The largest number up to `limit`, at least 1, that divides `size` into about equal shares."""
    return math.ceil(size / math.ceil(size / max(1, limit))) if size else 1


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


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
    """What transformers calls in place of its eager attention."""
    if dropout > 0 and module.training:
        raise GradmemError("gradmem attention has no dropout: set the attention dropout of the backbone to 0")
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise GradmemError(f"gradmem attention has no {name}: use a backbone without it, or eager attention")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    # Without a mask a module is causal unless it says otherwise: `_mask_interface` never drops any other mask.
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
    """Build the boolean mask, or None where it would be the causal one that `attention` applies by itself."""
    plain = mask_function is causal_mask_function or (local_size is not None and kv_length < local_size)
    # A static cache has keys after the last query.
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
