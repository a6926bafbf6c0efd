"""Memory: what a WRITE leaves behind."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Memory:
    """Named tensors with a batch dimension.

    Attributes
    ----------
    tensors : dict of Tensor, shapes (batch, ...)
    """

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return next(iter(self.tensors.values())).shape[0]
