"""Mean pooling: the simplest memory, and the example of how to add a method."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backbone import Backbone
from ..batch import Tokens
from ..inner.optimizers import Tensors
from ..memory import Memory
from .base.one_pass import OnePassMethod
from .base.options import keywords_of
from .base.prefix_method import Phase, PrefixMethod, PrefixOptions


class MeanPool(OnePassMethod, PrefixMethod):
    """Memory vectors that are means of token embeddings: vector i is the mean of the i-th part of the context.

    Parameters
    ----------
    backbone : Backbone
    **options
        The fields of `PrefixOptions`; the context is divided into `n_mem` parts.
    """

    write_head = None

    @keywords_of(PrefixOptions)
    def __init__(self, backbone: Backbone, **options: Any) -> None:
        super().__init__(backbone, PrefixOptions(**options).n_mem)
        self.initial_memory.requires_grad_(False)  # what is written does not depend on it

    def _unwritten(self, batch: int) -> Memory:
        return Memory(self._start(batch))

    def _written(self, context: Tokens) -> Memory:
        # The part of its row, of m, that each token belongs to.
        positions = torch.arange(context.ids.shape[1], device=context.ids.device)
        part = positions * self.n_mem // context.lengths[:, None]
        embeds = self.backbone.embed(context.ids)
        member = (part[..., None] == torch.arange(self.n_mem, device=part.device)) & context.mask[..., None]
        weights = member.mT.to(embeds.dtype)
        # A context shorter than m leaves parts empty: their mean is zero.
        return Memory({"memory": weights @ embeds / weights.sum(-1, keepdim=True).clamp_min(1)})

    def _project(self, phase: Phase, tensors: Tensors) -> Tensor:
        return tensors["memory"].to(self.initial_memory.dtype)
