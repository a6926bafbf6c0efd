"""RMT: WRITE by forward passes over the context (Recurrent Memory Transformer, arXiv 2207.06881)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..backbone import Backbone
from ..batch import Tokens
from ..inner.objective import sample_losses
from ..inner.optimizers import Tensors
from ..memory import Memory
from .base import Written
from .base.chunked import ChunkedMethod, ChunkedOptions
from .base.options import keywords_of
from .base.prefix_method import pads_last


@dataclass(frozen=True, kw_only=True)
class RMTOptions(ChunkedOptions):
    """Options of `rmt`."""

    projection: Literal["none", "proj", "proj_rw"] = "none"
    """Linear map P of the memory before it enters the model: none; proj, one in WRITE; or proj_rw, one in WRITE and
    another in READ."""
    residual: bool = False
    """From the second pass on, add the layer-normalised hidden states to M instead of replacing it. No recipe uses it;
    the published code has it."""
    reconstruction: bool = False
    """Learn to reconstruct the context from the memory. The write loss is the mean over the tokens of passes 2 to
    K + 1; the recipe's `write_loss_weight` weights it."""
    chunk_mode: Literal["sequential", "independent"] = "sequential"
    """How the chunks (segments) of a context are written. sequential: each starts from the memory that the one before
    it left, as in the original RMT. independent: each has vectors of its own, which READ sees together."""


class RMT(ChunkedMethod):
    """Memory vectors that the model itself writes: its last hidden states at the positions after the context.

    A write step is one pass over `[write_start ; P(M) ; write_end ; E(context) ; write_start ; P(M)]`; the last m
    hidden states, after the final norm, are the next M. Gradients pass through all steps. This is the RMT that GradMem
    is compared with (arXiv 2603.13875).

    Parameters
    ----------
    backbone : Backbone
    **options
        The fields of `RMTOptions`.
    """

    @keywords_of(RMTOptions)
    def __init__(self, backbone: Backbone, **options: Any) -> None:
        own = RMTOptions(**options)
        super().__init__(backbone, own)
        self.reconstruction = own.reconstruction
        self.proj = None if own.projection == "none" else self._new_projection(identity=False)
        self.read_proj = self._new_projection(identity=True) if own.projection == "proj_rw" else None
        like = self.initial_memory
        self.norm = nn.LayerNorm(backbone.width, dtype=like.dtype, device=like.device) if own.residual else None
        self.write_head = self._new_write_head(own.write_head)

    @property
    def max_chunk(self) -> int:
        """Longest segment in tokens: the backbone's positions less memory and control vectors."""
        return self.backbone.max_positions - self.prefix_length - self.n_ctrl - self.n_mem

    def trajectory_from(
        self, context: Tokens, start: Tensors, steps: int, until: float | None, more: bool = False
    ) -> Iterator[Written]:
        """Yield the memory before the first pass and after every pass; see `ChunkedMethod.trajectory_from`.

        Only with `reconstruction` are there write losses, which `until` needs.
        """
        if not self.reconstruction:
            self._refuse_until(until)
        embeds = self.backbone.embed(context.ids)
        memory = start["memory"].to(self.initial_memory.dtype)
        losses = embeds.new_zeros(0, len(context))
        taken = torch.zeros_like(context.lengths)
        yield Written(Memory({"memory": memory}), losses, taken)
        for step in range(steps):
            hidden = self._pass(memory, context, embeds)
            new = self._last_vectors(hidden, context)
            if self.norm is not None and step:
                new = memory + self.norm(new)
            if self.reconstruction:
                # The pass predicts the context from the memory that it is to replace.
                loss = sample_losses(self._losses_of(hidden[:, self.prefix_length - 1 :], context), context.mask)
                active = torch.ones_like(loss, dtype=torch.bool) if until is None else loss > until
                if until is not None and not active.any():
                    return
                new = torch.where(active[:, None, None], new, memory)
                losses, taken = torch.cat([losses, loss[None]]), taken + active
            else:
                taken = taken + 1
            memory = new
            yield Written(Memory({"memory": memory}), losses, taken)

    def write_loss(self, written: Written, context: Tokens) -> Tensor:
        """Compute the mean loss of the context's tokens in passes 2 to K + 1; zero without `reconstruction`.

        WRITE does not need the last of these passes, so it runs here.
        """
        if not len(written.losses):
            return written.losses.new_zeros(())
        last = sample_losses(self.token_losses(written.memory, context), context.mask)
        losses = torch.cat([written.losses[1:], last[None]])
        return (losses * context.lengths).sum(1).mean() / context.lengths.sum()

    def _project(self, phase: Literal["write", "read"], tensors: Tensors) -> Tensor:
        memory = tensors["memory"].to(self.initial_memory.dtype)
        projection = self.proj if phase == "write" else self.read_proj
        return memory if projection is None else projection(memory)

    def _pass(self, memory: Tensor, context: Tokens, embeds: Tensor) -> Tensor:
        """Run one pass, pads last: hidden states of shape (batch, (m + 2c) + length + (c + m), d)."""
        prefix = self._surround("write", {"memory": memory})
        trailing = prefix[:, : self.n_ctrl + self.n_mem]
        # The trailing vectors stand right after each row's last token.
        real = torch.cat([context.mask, context.mask.new_ones(trailing.shape[:2])], dim=1)
        body = pads_last(torch.cat([embeds, trailing], dim=1), real)
        return self.backbone.hidden(torch.cat([prefix, body], dim=1))

    def _last_vectors(self, hidden: Tensor, context: Tokens) -> Tensor:
        """Take the hidden states at the m positions before each row's pads: shape (batch, m, d)."""
        first = self.prefix_length + context.lengths + self.n_ctrl
        positions = first[:, None] + torch.arange(self.n_mem, device=first.device)
        return hidden.take_along_dim(positions[..., None], dim=1).to(self.initial_memory.dtype)
