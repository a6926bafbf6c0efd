"""RMT in two segments: WRITE by forward passes over the context (Recurrent Memory Transformer, arXiv 2207.06881)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from ..backbone import Backbone
from ..batch import Tokens
from ..errors import require
from ..inner.objective import sample_losses
from ..inner.optimizers import Tensors
from ..memory import Memory
from .base import Written
from .base.chunked import ChunkedMethod
from .base.prefix_method import Head, pads_last


class RMT(ChunkedMethod):
    """Memory vectors that the model itself writes: its last hidden states at positions after the context.

    A write step is one pass over `[write_start ; P(M) ; write_end ; E(context) ; write_start ; P(M)]`; the last m
    hidden states, after the final norm, are the next M. Gradients pass through all steps. This is the RMT that GradMem
    is compared with (arXiv 2603.13875).

    Parameters
    ----------
    backbone : Backbone
    n_mem : int
        Memory vectors m.
    write_steps : int
        Default number of write steps, passes over the context, K.
    n_ctrl : int
        Control vectors before and after the memory, own ones for WRITE and READ.
    projection : {"none", "proj", "proj_rw"}
        Linear map P of the memory before it enters the model: none, one in WRITE, or one in each of WRITE and READ.
    residual : bool
        From the second pass on, add the layer-normalised hidden states to M instead of replacing it.
    write_head : {"none", "copy", "random"}
        Output layer of its own to reconstruct the context with, starting as a copy of the LM head or drawn
        independently.
    reconstruction : bool
        Learn to reconstruct the context from the memory: the write loss is that of passes 2 to K + 1, averaged over
        tokens, then over passes. It counts as the trainer weights it (`inner_loss_weight`).
    chunk_size : int, optional
        Most tokens of a segment; by default a context is one.
    chunk_mode : {"sequential", "independent"}
        Write a segment from the memory that the one before it left, as in the original RMT; or each into vectors of
        its own, which READ sees together.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        n_mem: int = 8,
        write_steps: int = 1,
        n_ctrl: int = 0,
        projection: Literal["none", "proj", "proj_rw"] = "none",
        residual: bool = False,
        write_head: Head = "none",
        reconstruction: bool = False,
        chunk_size: int | None = None,
        chunk_mode: Literal["sequential", "independent"] = "sequential",
    ) -> None:
        super().__init__(backbone, n_mem, write_steps, n_ctrl, chunk_size, chunk_mode)
        require("projection", projection, projection in ("none", "proj", "proj_rw"), "none, proj or proj_rw")
        self.reconstruction = reconstruction
        self.proj = None if projection == "none" else self._new_projection(identity=False)
        self.read_proj = self._new_projection(identity=True) if projection == "proj_rw" else None
        like = self.initial_memory
        self.norm = nn.LayerNorm(backbone.width, dtype=like.dtype, device=like.device) if residual else None
        self.write_head = self._new_write_head(write_head)

    @property
    def max_chunk(self) -> int:
        """Longest segment in tokens: what the backbone's positions leave beside memory and control vectors."""
        return self.backbone.max_positions - self.prefix_length - self.n_ctrl - self.n_mem

    def trajectory_from(
        self, context: Tokens, start: Tensors, steps: int, until: float | None, more: bool = False
    ) -> Iterator[Written]:
        """Yield the memory before the first pass and after every pass; see `ChunkedMethod.trajectory_from`.

        Losses, and `until`, are there with `reconstruction` only.
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
                loss = sample_losses(self._losses_of(hidden, context), context.mask)
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
        """Mean loss of the context's tokens in passes 2 to K + 1; zero without `reconstruction`.

        The last of these passes runs here: WRITE has no use for it.
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
        """Hidden states of one pass, pads last: (batch, (m + 2c) + length + (c + m), d)."""
        prefix = self._surround("write", {"memory": memory})
        trailing = prefix[:, : self.n_ctrl + self.n_mem]
        # The trailing vectors stand right after each row's last token.
        real = torch.cat([context.mask, context.mask.new_ones(trailing.shape[:2])], dim=1)
        body = pads_last(torch.cat([embeds, trailing], dim=1), real)
        return self.backbone.hidden(torch.cat([prefix, body], dim=1))

    def _last_vectors(self, hidden: Tensor, context: Tokens) -> Tensor:
        """Hidden states at the m positions before each row's pads, shape (batch, m, d)."""
        first = self.prefix_length + context.lengths + self.n_ctrl
        positions = first[:, None] + torch.arange(self.n_mem, device=first.device)
        return hidden.take_along_dim(positions[..., None], dim=1).to(self.initial_memory.dtype)
