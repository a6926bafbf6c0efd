"""Clip the meta-gradients of micro-batches, each by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

import torch
from torch import nn
from torch.nn.utils import get_total_norm

RECENT = 256
"""Micro-batches whose norms are remembered."""


class PartGradients:
    """The sum of the meta-gradients of a batch's parts, none of them longer than was usual until now.

    A few contexts, whose WRITE hardly converges, have gradients many times as long as the others'. In the mean of a
    batch one of them decides where all go; clipped by itself it counts as one of them.

    Parameters
    ----------
    parameters : sequence of nn.Parameter
    norms : sequence of float
        Norms of earlier parts, of the kind that `norms` has; the limit is their median.

    Attributes
    ----------
    norms : list of float
        Norms of the parts that were taken, before clipping, each as if the part were the whole batch.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], norms: Sequence[float]) -> None:
        self.parameters, self.norms = parameters, list[float]()
        self.limit = median(norms) if norms else math.inf
        self.sums = [torch.zeros_like(parameter) for parameter in parameters]

    def take(self, share: float) -> None:
        """Take the gradient of a part, which is this share of the batch, from the parameters."""
        grads = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = float(get_total_norm(grads)) / share
        self.norms.append(norm)
        factor = min(1.0, self.limit / max(norm, 1e-30))
        for parameter, total in zip(self.parameters, self.sums, strict=True):
            if parameter.grad is not None:
                total.add_(parameter.grad, alpha=factor)
                parameter.grad = None
