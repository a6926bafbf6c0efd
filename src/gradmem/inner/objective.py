"""The reconstruction loss that WRITE descends."""

from __future__ import annotations

from torch import Tensor

from ..ops.cross_entropy import cross_entropy
from ..ops.head import Head


def token_losses(hidden: Tensor, head: Head, ids: Tensor, mask: Tensor) -> Tensor:
    """Compute the cross-entropy of each token, zero at pads.

    Parameters
    ----------
    hidden : Tensor, shape (batch, length, d)
        Row t predicts token t.
    head : nn.Linear or ScaledHead
        Output layer, d -> vocabulary.
    ids : Tensor, int64, shape (batch, length)
    mask : Tensor, bool, shape (batch, length)

    Returns
    -------
    Tensor, shape (batch, length), nats, at least float32
    """
    return cross_entropy(hidden, head, ids) * mask


def sample_losses(losses: Tensor, mask: Tensor) -> Tensor:
    """Average over the real tokens of each sample: (batch, length) -> (batch,). Paper section 3, L_b."""
    return losses.sum(1) / mask.sum(1)


def joint_losses(losses: Tensor, mask: Tensor, rows: Tensor, samples: int) -> Tensor:
    """Average over the real tokens of all chunks of each sample.

    Parameters
    ----------
    losses, mask : Tensor, shape (chunks, length)
    rows : Tensor, int64, shape (chunks,)
        The sample of each chunk.
    samples : int

    Returns
    -------
    Tensor, shape (samples,)
    """
    tokens = rows.new_zeros(samples).index_add(0, rows, mask.sum(1))
    return losses.new_zeros(samples).index_add(0, rows, losses.sum(1)) / tokens
