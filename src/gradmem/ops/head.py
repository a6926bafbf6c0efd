"""Output layers of models that scale or cap their logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ScaledHead:
    """An output layer whose logits z the model changes: to scale * z, or to cap * tanh(scale * z / cap).

    Granite and Cohere scale their logits; Gemma 2 caps them.

    Attributes
    ----------
    layer : nn.Linear
    scale : float
    cap : float or None
    """

    layer: nn.Linear
    scale: float = 1.0
    cap: float | None = None

    @property
    def weight(self) -> Tensor:
        """Weight of the output layer, shape (vocabulary, d)."""
        return self.layer.weight

    def __call__(self, hidden: Tensor) -> Tensor:
        """Map hidden states to logits."""
        return self.finish(self.layer(hidden))

    def finish(self, logits: Tensor) -> Tensor:
        """Scale and cap the logits of the layer."""
        scaled = logits * self.scale
        return scaled if self.cap is None else self.cap * torch.tanh(scaled / self.cap)


Head = nn.Linear | ScaledHead
"""An output layer."""
