"""Mean pooling: the simplest memory there is, and the worked example of how to add a method."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backbone import Backbone
from ..batch import Tokens
from ..inner.optimizers import Tensors
from ..memory import Memory
from .base.one_pass import OnePassMethod
from .base.prefix_method import Phase, PrefixMethod


class MeanPool(OnePassMethod, PrefixMethod):
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

    def _unwritten(self, batch: int) -> Memory:
        return Memory(self._start(batch))

    def _written(self, context: Tokens) -> Memory:
        # Which of the m parts of its row a token belongs to.
        places = torch.arange(context.ids.shape[1], device=context.ids.device)
        part = places * self.n_mem // context.lengths[:, None]
        embeds = self.backbone.embed(context.ids)
        member = (part[..., None] == torch.arange(self.n_mem, device=part.device)) & context.mask[..., None]
        weights = member.mT.to(embeds.dtype)
        # A context shorter than m leaves parts empty: their mean is zero.
        return Memory({"memory": weights @ embeds / weights.sum(-1, keepdim=True).clamp_min(1)})

    def _project(self, phase: Phase, tensors: Tensors) -> Tensor:
        return tensors["memory"].to(self.initial_memory.dtype)
