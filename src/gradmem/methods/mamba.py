"""Mamba: the state of a selective state-space model after the context is the memory (arXiv 2312.00752)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ..backbone import Backbone
from ..batch import Tokens
from ..errors import GradmemError
from ..generation import check_options, copies
from ..memory import Memory
from ..ops.dtypes import work_dtype
from ..ops.selective_scan import selective_scan
from ..prefix import Prefix
from .base.one_pass import OnePassMethod
from .base.options import Options, keywords_of
from .base.state_prefix import StatePrefix
from .base.written import compare_forms

State = tuple[Tensor, Tensor]
"""The last inputs to the convolution (batch, k - 1, channels) and the state of the scan (batch, channels, n) of one
layer, or of all layers in a second dimension."""


@dataclass(frozen=True, kw_only=True)
class MambaOptions(Options):
    """Options of `mamba`."""

    reconstruction: bool = False
    """Also learn to reconstruct the context from the memory; the recipe's `write_loss_weight` weights it."""


class Mamba(OnePassMethod):
    """Recurrent states of all layers, of a size that does not depend on the context.

    The memory holds `conv`, shape (batch, layers, k - 1, channels), and `ssm`, shape (batch, layers, channels, n): the
    last inputs of the convolution of width k, and the state of the scan.

    Parameters
    ----------
    backbone : Backbone
        Mamba, `model_type: mamba`.
    **options
        The fields of `MambaOptions`.

    Raises
    ------
    GradmemError
        If the backbone is another model.
    """

    needs_kv_cache = False

    @keywords_of(MambaOptions)
    def __init__(self, backbone: Backbone, **options: Any) -> None:
        super().__init__(backbone)
        self.reconstruction = MambaOptions(**options).reconstruction
        kind = backbone.model.config.model_type
        if kind != "mamba":
            raise GradmemError(f"the mamba method only runs on Mamba, not on '{kind}': set `model_type: mamba`")

    @property
    def max_context(self) -> int:
        """Longest context in tokens; the state itself has no limit."""
        return self.backbone.max_positions

    def prefix(self, memory: Memory) -> Prefix:
        """Use the states as the prefix; nothing is run."""
        last = memory.tensors["conv"].new_zeros(len(memory), self.backbone.width)
        return StatePrefix(memory.tensors, last, DynamicCache())

    def check(self, memory: Memory, what: str) -> None:
        """Raise `GradmemError` unless the memory has the tensors and shapes that this method writes."""
        compare_forms(memory, self._unwritten(1), what)

    def read_hidden(self, prefix: Prefix, queries: Tokens) -> Tensor:
        """Compute the hidden states that predict; the first row is zero. See `Method.read_hidden`."""
        hidden, _ = self._run(queries, _states(prefix))
        return torch.cat([prefix.last[:, None].to(hidden.dtype), hidden], dim=1)

    def _continue(
        self, prefix: Prefix, queries: list[list[int]], pad_id: int, options: dict[str, Any]
    ) -> list[list[int]]:
        """Run the queries without their last tokens, from which the generation of transformers then goes on."""
        control = options.pop("control", None)
        check_options(options)
        model = self.backbone.model
        device = prefix.last.device
        given = Tokens.from_lists([query[:-1] for query in queries], pad_id).to(device)
        _, states = self._run(given, _states(prefix))
        cache = DynamicCache(config=model.config)
        for layer, state in enumerate(zip(*(tensor.unbind(1) for tensor in states), strict=True)):
            # Generation repeats ids for beams and sequences, but not a cache that it is given.
            conv, ssm = (tensor.repeat_interleave(copies(options), dim=0) for tensor in state)
            # transformers keeps one more input than the convolution will need.
            cache.update_conv_state(F.pad(conv.mT, (1, 0)).to(model.dtype), layer, conv_kernel_size=conv.shape[1] + 1)
            cache.update_recurrent_state(ssm, layer)
        ids = torch.tensor([query[-1:] for query in queries], device=device)
        options |= {} if control is None else control.hooks(list(range(len(queries))))
        generated = self.backbone.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), cache_params=cache, pad_token_id=pad_id, **options
        )
        return generated[:, 1:].tolist() if control is None else control.ids

    def _unwritten(self, batch: int) -> Memory:
        config, like = self.backbone.model.config, self.backbone.body.layers[0].mixer.A_log
        shapes = {
            "conv": (config.conv_kernel - 1, config.intermediate_size),
            "ssm": (config.intermediate_size, config.state_size),
        }
        return Memory(
            {
                name: like.new_zeros(batch, config.num_hidden_layers, *shape, dtype=work_dtype(like))
                for name, shape in shapes.items()
            }
        )

    def _written(self, context: Tokens) -> Memory:
        unwritten = self._unwritten(len(context)).tensors
        _, (conv, ssm) = self._run(context, (unwritten["conv"], unwritten["ssm"]))
        return Memory({"conv": conv, "ssm": ssm})

    def _run(self, tokens: Tokens, states: State) -> tuple[Tensor, State]:
        """Run the blocks from given states of all layers.

        The forward of transformers starts every sequence from a zero state, and single tokens have no gradients.
        """
        hidden, base = self.backbone.embed(tokens.ids), self.backbone.body
        if not hidden.shape[1]:
            return hidden, states
        after = []
        for layer, block in enumerate(base.layers):
            normed = block.norm(hidden.to(block.norm.weight.dtype))
            residual = hidden.float() if block.residual_in_fp32 else hidden
            mixed, state = mix(block.mixer, normed, (states[0][:, layer], states[1][:, layer]), tokens.mask)
            hidden = residual + mixed
            after.append(state)
        conv, ssm = (torch.stack(tensors, dim=1) for tensors in zip(*after, strict=True))
        return base.norm_f(hidden), (conv, ssm)


def _states(prefix: Prefix) -> State:
    assert isinstance(prefix, StatePrefix)
    return prefix.state["conv"], prefix.state["ssm"]


def mix(mixer: Any, hidden: Tensor, state: State, mask: Tensor) -> tuple[Tensor, State]:
    """Compute what transformers' `MambaMixer` does, from any state and with gradients (arXiv 2312.00752, section 3).

    Parameters
    ----------
    mixer : MambaMixer
    hidden : Tensor, shape (batch, length, d)
    state : tuple of Tensor, shapes (batch, k - 1, channels) and (batch, channels, n)
        The last inputs to the convolution of width k, and the state of the scan.
    mask : Tensor, bool, shape (batch, length)
        True at real tokens, which come first; the others do not change the state.

    Returns
    -------
    Tensor, shape (batch, length, d)
    tuple of Tensor
        The state after the real tokens.
    """
    conv, ssm = state
    inputs, gate = mixer.in_proj(hidden).chunk(2, dim=-1)
    past = torch.cat([conv.to(inputs.dtype), inputs], dim=1)
    kept = mask.sum(1)[:, None] + torch.arange(conv.shape[1], device=mask.device)
    conv = past.take_along_dim(kept[..., None], dim=1)
    x = mixer.act(F.conv1d(past.mT, mixer.conv1d.weight, mixer.conv1d.bias, groups=past.shape[2]).mT)

    sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
    rank, b, c = mixer.x_proj(x).split(sizes, dim=-1)
    dtype = work_dtype(mixer.A_log)
    dt = F.softplus(F.linear(rank, mixer.dt_proj.weight) + mixer.dt_proj.bias.to(dtype))
    dt, x = dt * mask[..., None], x.to(dtype)
    y, ssm = selective_scan(x, dt, -torch.exp(mixer.A_log.to(dtype)), b.to(dtype), c.to(dtype), ssm.to(dtype))
    y = y + mixer.D.to(dtype) * x
    return mixer.out_proj((y * F.silu(gate)).to(hidden.dtype)), (conv, ssm)
