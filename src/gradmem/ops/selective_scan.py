"""The scan of a selective state-space model, with gradients (arXiv 2312.00752, section 3).

On a CPU it runs token by token: operations on whole sequences need tensors of (batch, length, channels, n), and would
mostly wait for memory. On other devices launching many small operations takes longer, so pairs of tokens are combined,
then pairs of pairs (Blelloch, "Prefix sums and their applications", 1990).

The kernels of `mamba_ssm`, which transformers uses, always start from a zero state and have no gradient for the state
after the last token, which is the memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dtypes import no_autocast


def selective_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Compute y_t = h_t c_t with h_t = exp(dt_t a) h_(t-1) + dt_t x_t b_t; can be differentiated once.

    Parameters
    ----------
    x, dt : Tensor, shape (batch, length, channels)
        Inputs and step sizes.
    a : Tensor, shape (channels, n)
        Rates; states decay where they are negative.
    b, c : Tensor, shape (batch, length, n)
        Weights of writing inputs to the states, and of reading outputs from them.
    state : Tensor, shape (batch, channels, n)
        State before the first token.

    Returns
    -------
    y : Tensor, shape (batch, length, channels)
    state : Tensor, shape (batch, channels, n)
        State after the last token.
    """
    scan = TokenScan if x.device.type == "cpu" else PairScan
    return scan.apply(x, dt, a, b, c, state)


class TokenScan(torch.autograd.Function):
    """Scan token by token; only the states are kept."""

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


class PairScan(torch.autograd.Function):
    """Scan all tokens of a sequence at once, with about two operations for each doubling of its length."""

    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> tuple[Tensor, Tensor]:
        x, dt, a, b, c, state = given
        with no_autocast(x):
            decays, writes = torch.exp(dt[..., None] * a), (dt * x)[..., None] * b[:, :, None]
            writes[:, 0] += decays[:, 0] * state
            states = _joined(decays, writes)
            y = (states @ c[..., None])[..., 0]
        ctx.save_for_backward(*given, states)
        return y, states[:, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor, ...]:
        x, dt, a, b, c, state, states = ctx.saved_tensors
        of_y, of_state = given
        with no_autocast(x):
            decays = torch.exp(dt[..., None] * a)
            # A state acts on its own output, and on the next state: the same scan, backwards.
            own = of_y[..., None] * c[:, :, None]
            own[:, -1] += of_state
            ahead = torch.cat([torch.ones_like(decays[:, :1]), decays[:, 1:].flip(1)], 1)
            of_states = _joined(ahead, own.flip(1)).flip(1)
            of_c = (of_y[:, :, None] @ states)[:, :, 0]
            # Through what the tokens write: dt x b.
            of_b = ((dt * x)[:, :, None] @ of_states)[:, :, 0]
            written = (of_states @ b[..., None])[..., 0]
            # Through what they leave of the state before: exp(dt a).
            left = of_states * decays
            of_exponent = left * torch.cat([state[:, None], states[:, :-1]], 1)
            of_dt = x * written + (of_exponent * a).sum(-1)
            of_a = (of_exponent * dt[..., None]).sum((0, 1))
        return dt * written, of_dt, of_a, of_b, of_c, left[:, 0]


def _joined(decays: Tensor, writes: Tensor) -> Tensor:
    """Compute s_t = decays_t s_(t-1) + writes_t from s_(-1) = 0; all of shape (batch, length, ...)."""
    length = writes.shape[1]
    if length == 1:
        return writes
    pairs, even = length // 2, (length + 1) // 2
    first, second = slice(0, 2 * pairs, 2), slice(1, None, 2)
    odd = _joined(decays[:, first] * decays[:, second], decays[:, second] * writes[:, first] + writes[:, second])
    states = torch.empty_like(writes)
    states[:, 1::2] = odd
    states[:, :1] = writes[:, :1]
    states[:, 2::2] = decays[:, 2::2] * odd[:, : even - 1] + writes[:, 2::2]
    return states
