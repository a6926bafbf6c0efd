"""The reconstruction loss that WRITE descends."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def token_losses(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy of each token, zero at pads.

    Parameters
    ----------
    logits : Tensor, shape (batch, length, vocabulary)
        Row t predicts token t.
    ids : Tensor, int64, shape (batch, length)
    mask : Tensor, bool, shape (batch, length)

    Returns
    -------
    Tensor, shape (batch, length), nats, at least float32
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    losses = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    return losses * mask


def sample_losses(losses: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real tokens of each sample: (batch, length) -> (batch,). Paper section 3, L_b."""
    return losses.sum(1) / mask.sum(1)
