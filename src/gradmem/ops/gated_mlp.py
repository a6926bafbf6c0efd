"""The gated MLP of Llama and its relatives, with a closed-form gradient and second derivative.

If PyTorch differentiates `silu(gate) * up` twice, it keeps a dozen tensors of the width of the MLP. Here three are
kept: gate, up and the gradient of the output.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")


def matches(module: nn.Module) -> bool:
    """Whether a module has the parts of `down_proj(silu(gate_proj(x)) * up_proj(x))`."""
    return all(isinstance(getattr(module, part, None), nn.Module) for part in PARTS)


def forward(module: Any, hidden: Tensor) -> Tensor:
    """Compute what the module's own forward does."""
    out: Tensor = module.down_proj(gated(module.gate_proj(hidden), module.up_proj(hidden)))
    return out


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """Compute `silu(gate) * up`, for tensors of one shape; can be differentiated twice."""
    out: Tensor = _Gated.apply(gate, up)
    return out


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...] = _Gradient.apply(grad, *ctx.saved_tensors)
        return out


class _Gradient(torch.autograd.Function):
    """With h = silu: d_gate = grad * up * h'(gate), d_up = grad * h(gate)."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(grad, gate, up)
        return torch.ops.aten.silu_backward(grad, gate).mul_(up), F.silu(gate).mul_(grad)

    @staticmethod
    def backward(ctx: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if torch.is_grad_enabled():
            raise RuntimeError("gated_mlp has no third derivative: use the model's own MLP")
        grad, gate, up = ctx.saved_tensors
        s = torch.sigmoid(gate)
        rest = 1 - s
        h = gate * s
        first = torch.addcmul(s, h, rest)  # h'
        second = (rest * s).mul_(2 + gate * (1 - 2 * s))  # h''
        au = a * up
        d_grad = torch.addcmul(b * h, au, first)
        d_gate = torch.addcmul(b * first, au, second).mul_(grad)
        d_up = first.mul_(a).mul_(grad)
        return d_grad, d_gate, d_up
