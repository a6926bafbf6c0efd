"""Mean pooling: the simplest memory there is, and the worked example of how to add a method."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from ..backbone import Backbone
from ..batch import Tokens
from ..inner.optimizers import Tensors
from ..memory import Memory
from ._prefix import PrefixMethod
from .base import Written


class MeanPool(PrefixMethod):
    """Memory vectors that are means of token embeddings: vector i is that of the i-th part of the context.

    Parameters
    ----------
    backbone : Backbone
    n_mem : int
        Memory vectors, parts of the context.
    """

    write_head = None

    def __init__(self, backbone: Backbone, *, n_mem: int = 8) -> None:
        super().__init__(backbone, n_mem, write_steps=1, n_ctrl=0)
        self.initial_memory.requires_grad_(False)  # what is written does not depend on it

    def trajectory(self, context: Tokens, steps: int, *, until: float | None = None) -> Iterator[Written]:
        """Yield the unwritten memory and, with any steps, the means; see `Method.trajectory`."""
        self._check_write(context, steps)
        self._refuse_until(until)
        losses, taken = self.initial_memory.new_zeros(0, len(context)), torch.zeros_like(context.lengths)
        yield Written(Memory(self._start(len(context))), losses, taken)
        if steps:
            yield Written(Memory({"memory": self._pool(context)}), losses, taken + 1)

    def _pool(self, context: Tokens) -> Tensor:
        # Which of the m parts of its row a token belongs to.
        places = torch.arange(context.ids.shape[1], device=context.ids.device)
        part = places * self.n_mem // context.lengths[:, None]
        embeds = self.backbone.embed(context.ids)
        member = (part[..., None] == torch.arange(self.n_mem, device=part.device)) & context.mask[..., None]
        weights = member.mT.to(embeds.dtype)
        # A context shorter than m leaves parts empty: their mean is zero.
        return weights @ embeds / weights.sum(-1, keepdim=True).clamp_min(1)

    def _project(self, phase: Literal["write", "read"], tensors: Tensors) -> Tensor:
        return tensors["memory"].to(self.initial_memory.dtype)
