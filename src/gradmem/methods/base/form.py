"""Forms of a memory other than vectors before the input."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbone import Backbone
from ...inner.optimizers import Tensors
from ...prefix import Prefix


class Form(nn.Module, ABC):
    """What a memory is made of, and how the model runs tokens with it.

    A learned vector, `begin`, stands before the tokens in WRITE and READ and predicts the first of them. It starts as
    the embedding of the model's token for the beginning of a text, if it has one.

    Parameters
    ----------
    backbone : Backbone
    begin : bool
        Whether there is such a vector. Without it nothing predicts the first token, as in the published code.
    """

    slots: int = 0
    """Positions that a memory takes before the tokens."""

    def __init__(self, backbone: Backbone, begin: bool) -> None:
        super().__init__()
        self.begin = nn.Parameter(_begin_vector(backbone)) if begin else None
        self.initial = nn.ParameterDict()

    @property
    def length(self) -> int:
        """Positions before the first token."""
        return self.slots + (self.begin is not None)

    def start(self, batch: int) -> Tensors:
        """Build the tensors of a memory that nothing was written into."""
        return {name: tensor.expand(batch, *tensor.shape) for name, tensor in self.initial.items()}

    @abstractmethod
    def rate_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of learned inner learning rates, which broadcast against the tensors of one memory."""

    def hidden(self, backbone: Backbone, tensors: Tensors, embeds: Tensor) -> Tensor:
        """Run tokens with a memory for each row.

        Parameters
        ----------
        backbone : Backbone
        tensors : dict of Tensor, shapes (batch, ...)
        embeds : Tensor, shape (batch, length, d)

        Returns
        -------
        Tensor, shape (batch, length + 1, d)
            Row t predicts token t. Row 0 is zero if nothing predicts the first token.
        """
        if self.begin is None:
            return F.pad(self.run(backbone, tensors, embeds), (0, 0, 1, 0))
        return self.run(backbone, tensors, torch.cat([self._begins(len(embeds)), embeds], dim=1))

    @abstractmethod
    def run(self, backbone: Backbone, tensors: Tensors, embeds: Tensor) -> Tensor:
        """Run embeddings as they are with a memory for each row: hidden states of their shape."""

    @abstractmethod
    def prefix(self, backbone: Backbone, tensors: Tensors, counts: Tensor | None = None) -> Prefix:
        """Run what stands before a query.

        Parameters
        ----------
        backbone : Backbone
        tensors : dict of Tensor, shapes (memories, ...)
        counts : Tensor, int64, shape (batch,), on the CPU, optional
            Number of memories that each row reads together, which follow one another; by default one.
        """

    def _begins(self, batch: int) -> Tensor:
        """The vector before the first token for each row: shape (batch, 1, d)."""
        assert self.begin is not None
        return self.begin.expand(batch, -1, -1)

    def _own(self, tensors: Tensors, name: str) -> Tensor:
        """A tensor of the memory in the type of the weights."""
        return tensors[name].to(self.initial[name].dtype)


def identity(width: int, like: Tensor) -> nn.Linear:
    """Create a linear map with bias that starts as the identity."""
    built = nn.Linear(width, width, dtype=like.dtype, device=like.device)
    nn.init.eye_(built.weight)
    nn.init.zeros_(built.bias)
    return built


def _begin_vector(backbone: Backbone) -> Tensor:
    weight = backbone.model.get_input_embeddings().weight
    token = getattr(backbone.model.config.get_text_config(decoder=True), "bos_token_id", None)
    if isinstance(token, int) and 0 <= token < len(weight):
        return weight.detach()[token : token + 1].clone()
    return backbone.random_embeddings(1)
