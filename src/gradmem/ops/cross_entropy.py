"""Cross-entropy of an output layer, in chunks and with a closed-form second derivative.

With a vocabulary of 49,000 the logits of 512 tokens take 100 MB, and differentiating twice keeps half a dozen tensors
of that size. Here only a chunk of logits exists at a time; each of the three passes computes it again. For one token
with hidden state h, weight W, target y, and c = dJ/dL:

    z = W h + bias,  L = logsumexp(z) - z_y,  p = softmax(z)                                forward
    dh = c W^T (p - e_y),  dW = c (p - e_y) h^T                                             gradient

and for a cotangent a of dh, with s = W a, r = p * (s - p.s):

    dJ/dc = (p - e_y).s,  dJ/dh = c W^T r,  dJ/dW = c (r h^T + (p - e_y) a^T),  dJ/dbias = c r

If the model caps its logits, p is the softmax of f(z) = cap * tanh(z / cap); p - e_y is then multiplied with f'(z),
and r = f' * p * (f' * s - p.(f' * s)) + f'' * (p - e_y) * s.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import GradmemError
from .dtypes import no_autocast, product_dtype, work_dtype
from .head import Head, ScaledHead
from .workspace import elements_at_once

CHUNK = 2**24
"""Logits to compute at once on a CPU. If all fit, PyTorch's own cross-entropy is used, which keeps them."""
CHUNK_SHARE = 128
"""On other devices, the logits take one in so many bytes of its memory."""


def cross_entropy(hidden: Tensor, head: Head, ids: Tensor) -> Tensor:
    """Compute the cross-entropy of tokens under an output layer; can be differentiated twice.

    Gradients with respect to `hidden` can be differentiated again, those with respect to the weights of the head
    cannot.

    Parameters
    ----------
    hidden : Tensor, shape (batch, length, d)
    head : nn.Linear or ScaledHead
        Output layer, d -> vocabulary.
    ids : Tensor, int64, shape (batch, length)

    Returns
    -------
    Tensor, shape (batch, length), nats, at least float32
    """
    layer, scale, cap = (head.layer, head.scale, head.cap) if isinstance(head, ScaledHead) else (head, 1.0, None)
    # Layers with adapters or quantization have a forward of their own.
    at_once = elements_at_once(hidden.device, CHUNK, CHUNK_SHARE)
    if type(layer) is not nn.Linear or ids.numel() * layer.out_features <= at_once:
        logits = head(hidden)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        return F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    dtype = product_dtype(hidden)
    rows, weight = (hidden * scale if scale != 1 else hidden).flatten(0, 1).to(dtype), layer.weight.to(dtype)
    bias = None if layer.bias is None else layer.bias.to(work_dtype(rows)) * scale
    losses: Tensor = _CrossEntropy.apply(rows, weight, bias, ids.flatten(), cap)
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        # A separate node, which is not run for gradients with respect to hidden states alone, as in WRITE.
        losses = losses + _HeadGradient.apply(rows.detach(), weight, bias, ids.flatten(), cap)
    return losses.view(ids.shape)


def _chunks(rows: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield logits and targets of some rows at a time; the caller may overwrite the logits."""
    size = max(1, elements_at_once(rows.device, CHUNK, CHUNK_SHARE) // weight.shape[0])
    for start in range(0, len(rows), size):
        some = slice(start, start + size)
        logits = (rows[some] @ weight.T).to(work_dtype(rows))
        yield some, logits if bias is None else logits.add_(bias), ids[some, None]


def _capped(logits: Tensor, cap: float | None) -> tuple[Tensor, Tensor | None]:
    """Compute f(z) in place of the logits, and tanh(z / cap) if they are capped."""
    if cap is None:
        return logits, None
    bent = logits.div_(cap).tanh_()
    return bent * cap, bent


def _errors(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute p - e_y in place of the logits."""
    torch.softmax(logits, 1, out=logits)
    return logits.scatter_add_(1, targets, logits.new_full(targets.shape, -1))


def _slopes(logits: Tensor, targets: Tensor, cap: float | None) -> Tensor:
    """Compute the gradient of the losses with respect to the logits z, in their place."""
    logits, bent = _capped(logits, cap)
    errors = _errors(logits, targets)
    return errors if bent is None else errors.mul_(1 - bent.square_())


def _derivatives(bent: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Compute f'(z) and f''(z) from tanh(z / cap)."""
    slope = 1 - bent.square()
    return slope, bent * slope * (-2 / cap)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left^T right to total; if types allow, without a second tensor of the size of the weight."""
    if total.dtype == right.dtype:
        total.addmm_(left.T, right)
    else:
        total += left.to(right.dtype).T @ right


class _CrossEntropy(torch.autograd.Function):
    """Losses, differentiable with respect to hidden states."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, cap: float | None) -> Tensor:
        ctx.save_for_backward(rows, weight, bias, ids)
        ctx.cap = cap
        losses = []
        with no_autocast(rows):
            for _, logits, targets in _chunks(rows, weight, bias, ids):
                logits, _ = _capped(logits, cap)
                losses.append(logits.logsumexp(1) - logits.gather(1, targets)[:, 0])
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Gradient.apply(grad, *ctx.saved_tensors, ctx.cap), None, None, None, None


class _Gradient(torch.autograd.Function):
    """dh as a function of c, hidden states, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, cap: float | None
    ) -> Tensor:
        ctx.save_for_backward(grad, rows, weight, bias, ids)
        ctx.cap = cap
        out = torch.empty_like(rows)
        with no_autocast(rows):
            for some, logits, targets in _chunks(rows, weight, bias, ids):
                errors = _slopes(logits, targets, cap).mul_(grad[some, None])
                out[some] = errors.to(rows.dtype) @ weight
        return out

    @staticmethod
    def backward(ctx: Any, a: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise GradmemError(
                "the loss of so large a vocabulary has no third derivative, so no gradient passes through Gauss-Newton "
                "steps: take `method.order: first`, which treats them as constants"
            )
        grad, rows, weight, bias, ids = ctx.saved_tensors
        d_grad, d_rows = torch.empty_like(grad), torch.empty_like(rows)
        d_weight = torch.zeros_like(weight, dtype=grad.dtype) if ctx.needs_input_grad[2] else None
        d_bias = torch.zeros_like(bias) if ctx.needs_input_grad[3] else None
        with no_autocast(rows):
            for some, logits, targets in _chunks(rows, weight, bias, ids):
                c = grad[some, None]
                logits, bent = _capped(logits, ctx.cap)
                errors = _errors(logits, targets)
                s = (a[some] @ weight.T).to(grad.dtype)
                slope, curve = (None, None) if bent is None else _derivatives(bent, ctx.cap)
                by_logits = errors if slope is None else errors * slope
                d_grad[some] = (by_logits * s).sum(1)
                if d_weight is not None:
                    _add_product(d_weight, by_logits * c, a[some])
                bend = 0 if curve is None else curve.mul_(errors).mul_(s)
                s = s if slope is None else s.mul_(slope)
                p = errors.scatter_add_(1, targets, errors.new_ones(targets.shape))
                r = s.sub_((p * s).sum(1, keepdim=True)).mul_(p)
                r = (r if slope is None else r.mul_(slope).add_(bend)).mul_(c)
                d_rows[some] = r.to(rows.dtype) @ weight
                if d_weight is not None:
                    _add_product(d_weight, r, rows[some])
                if d_bias is not None:
                    d_bias += r.sum(0)
        return d_grad, d_rows, None if d_weight is None else d_weight.to(weight.dtype), d_bias, None, None


class _HeadGradient(torch.autograd.Function):
    """Zero, with the gradient of the losses with respect to weight and bias."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, cap: float | None) -> Tensor:
        ctx.save_for_backward(rows, weight, bias, ids)
        ctx.cap = cap
        return rows.new_zeros(len(rows), dtype=work_dtype(rows))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("cross_entropy has no second derivative of the gradient of its weight")
        rows, weight, bias, ids = ctx.saved_tensors
        d_weight = torch.zeros_like(weight, dtype=grad.dtype)
        d_bias = None if bias is None else torch.zeros_like(bias)
        with no_autocast(rows):
            for some, logits, targets in _chunks(rows, weight, bias, ids):
                errors = _slopes(logits, targets, ctx.cap).mul_(grad[some, None])
                _add_product(d_weight, errors, rows[some])
                if d_bias is not None:
                    d_bias += errors.sum(0)
        return None, d_weight.to(weight.dtype), d_bias, None, None
