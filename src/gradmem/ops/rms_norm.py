"""RMS normalisation with a closed-form gradient and second derivative.

If PyTorch differentiates it twice, it keeps about ten tensors of the model's width. Here the input, the gradient of the
output and one number per position are kept. With mean m, r = 1 / sqrt(m(x^2) + eps), n = r x and y = n w:

    g = dy w,  dx = r (g - n m(g n)),  dw = sum dy n                                        gradient

and for cotangents a of dx and b of dw, with t = m(a n), c = m(g n), h = dy b, q = r (a - n t):

    dJ/d(dy) = w q + n b,  dJ/dw = sum dy q
    dJ/dx = r (h - n m(h n)) - r^2 (n m(a g) - 3 n t c + a c + g t)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .dtypes import work_dtype


def matches(module: nn.Module) -> bool:
    """Whether a module has the name and the parts of `weight * x / rms(x)`."""
    return (
        type(module).__name__.endswith("RMSNorm") and hasattr(module, "weight") and hasattr(module, "variance_epsilon")
    )


def forward(module: Any, hidden: Tensor) -> Tensor:
    """Compute what the module's own forward does."""
    return rms_norm(hidden, module.weight, module.variance_epsilon)


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute `weight * hidden / sqrt(mean(hidden^2) + eps)` over the last dimension; can be differentiated twice.

    Parameters
    ----------
    hidden : Tensor, shape (..., d)
    weight : Tensor, shape (d,)
    eps : float

    Returns
    -------
    Tensor, shape (..., d)
        Computed in at least float32 and returned in the type of `hidden * weight`.
    """
    out: Tensor = _RMSNorm.apply(hidden, weight, eps)
    return out


def _mean(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).mean(-1, keepdim=True)


def _over_rows(tensor: Tensor) -> Tensor:
    return tensor.flatten(0, -2).sum(0)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        work = x.to(work_dtype(x))
        r = (_mean(work, work) + eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (work * r).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_Gradient.apply(grad, *ctx.saved_tensors), None


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, x, weight, r)
        n, dy = x * r, grad.to(r.dtype)
        dw = _over_rows(dy * n)
        g = dy * weight
        return (n.mul_(_mean(g, n)).sub_(g).mul_(-r)).to(x.dtype), dw.to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, a: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("rms_norm has no third derivative: use the model's own norm")
        grad, x, weight, r = ctx.saved_tensors
        n, dy = x * r, grad.to(r.dtype)
        d_grad, d_x, d_weight = torch.zeros_like(n), torch.zeros_like(n), None
        if a is not None:
            a, g = a.to(r.dtype), dy * weight
            t, c = _mean(a, n), _mean(g, n)
            q = (a - n * t).mul_(r)
            d_weight = _over_rows(dy * q).to(weight.dtype)
            d_grad = q.mul_(weight)
            d_x = (n * (3 * t * c - _mean(a, g))).addcmul_(a, c, value=-1).addcmul_(g, t, value=-1).mul_(r * r)
        if b is not None:
            d_grad = d_grad + n * b
            h = dy * b
            d_x = d_x + (h - n * _mean(h, n)) * r
        return d_grad.to(grad.dtype), d_x.to(x.dtype), d_weight, None
