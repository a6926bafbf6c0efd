"""The scan of a selective state-space model, with gradients, one token at a time (arXiv 2312.00752, section 3).

Operations on whole sequences would hold a tensor of (batch, length, channels, n) each, and on a CPU wait for memory
most of the time. Here the states alone are kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..inner.precision import no_autocast


def selective_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs y_t = h_t c_t of the states h_t = exp(dt_t a) h_(t-1) + dt_t x_t b_t, differentiable once.

    Parameters
    ----------
    x, dt : Tensor, shape (batch, length, channels)
        Inputs and step sizes.
    a : Tensor, shape (channels, n)
        Rates, negative where states decay.
    b, c : Tensor, shape (batch, length, n)
        What inputs write to the states, and what is read of them.
    state : Tensor, shape (batch, channels, n)
        State before the first token.

    Returns
    -------
    y : Tensor, shape (batch, length, channels)
    state : Tensor, shape (batch, channels, n)
        State after the last token.
    """
    return _SelectiveScan.apply(x, dt, a, b, c, state)


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> tuple[Tensor, Tensor]:
        x, dt, a, b, c, state = given
        states = state.new_empty(x.shape[1] + 1, *state.shape)
        states[0], y = state, torch.empty_like(x)
        with no_autocast(x):
            for t in range(x.shape[1]):
                now = states[t + 1]
                torch.exp(dt[:, t, :, None] * a, out=now)
                now.mul_(states[t]).addcmul_((dt[:, t] * x[:, t])[..., None], b[:, t, None])
                y[:, t] = (now @ c[:, t, :, None])[..., 0]
        ctx.save_for_backward(x, dt, a, b, c, states)
        return y, states[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor, ...]:
        x, dt, a, b, c, states = ctx.saved_tensors
        of_y, of_state = given
        of_state = of_state.clone()
        of_x, of_dt, of_b, of_c = map(torch.empty_like, (x, dt, b, c))
        of_a = torch.zeros_like(a)
        with no_autocast(x):
            for t in reversed(range(x.shape[1])):
                of_state.addcmul_(of_y[:, t, :, None], c[:, t, None])
                of_c[:, t] = (of_y[:, t, None] @ states[t + 1])[:, 0]
                # Through what the token writes: dt x b.
                of_b[:, t] = ((dt[:, t] * x[:, t])[:, None] @ of_state)[:, 0]
                written = (of_state @ b[:, t, :, None])[..., 0]
                of_x[:, t] = dt[:, t] * written
                # Through what it leaves of the state: exp(dt a).
                of_state.mul_(torch.exp(dt[:, t, :, None] * a))
                of_exponent = of_state * states[t]
                of_dt[:, t] = x[:, t] * written + torch.einsum("bcn,cn->bc", of_exponent, a)
                of_a += torch.einsum("bcn,bc->cn", of_exponent, dt[:, t])
        return of_x, of_dt, of_a, of_b, of_c, of_state
