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
    """Average over the real tokens of each sample: (batch, length) -> (batch,). Paper section 3, L_b; 0 of none."""
    return losses.sum(1) / mask.sum(1).clamp_min(1)


def chunk_divisors(mask: Tensor, rows: Tensor, samples: int, *, alike: bool) -> Tensor:
    """Compute by what the summed loss of each chunk is divided in the loss of its sample.

    Parameters
    ----------
    mask : Tensor, bool, shape (chunks, length)
    rows : Tensor, int64, shape (chunks,)
        The sample of each chunk.
    samples : int
    alike : bool
        Whether chunks count alike, as published: their mean losses are summed and divided by the square of the most
        chunks of a sample. If not, the loss is the mean over the tokens of all chunks.

    Returns
    -------
    Tensor, int64, shape (chunks,)
    """
    tokens = mask.sum(1)
    if alike:
        return tokens.clamp_min(1) * rows.bincount(minlength=samples).max() ** 2
    return rows.new_zeros(samples).index_add(0, rows, tokens).clamp_min(1)[rows]


def joint_losses(losses: Tensor, divisors: Tensor, rows: Tensor, samples: int) -> Tensor:
    """Sum the token losses of all chunks of each sample, those of a chunk divided by its divisor.

    Parameters
    ----------
    losses : Tensor, shape (chunks, length)
    divisors : Tensor, shape (chunks,)
        From `chunk_divisors`.
    rows : Tensor, int64, shape (chunks,)
        The sample of each chunk.
    samples : int

    Returns
    -------
    Tensor, shape (samples,)
    """
    return losses.new_zeros(samples).index_add(0, rows, losses.sum(1) / divisors)
