"""The obvious meta-training step: K write steps unrolled with `create_graph=True`, everything recomputed.

Slow and simple on purpose: eager attention, a full forward for every step that embeds the context again,
logits at all positions, and a read that runs memory and query as one sequence.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel


def write_loss(model: PreTrainedModel, write_head: nn.Module, memory: Tensor, ids: Tensor) -> Tensor:
    """Mean loss of the context tokens under a memory, for each sample.

    Parameters
    ----------
    memory : Tensor, shape (batch, m, d)
    ids : Tensor, int64, shape (batch, length)
        Contexts of equal length, no pads.

    Returns
    -------
    Tensor, shape (batch,)
    """
    embeds = torch.cat([memory, model.get_input_embeddings()(ids)], dim=1)
    logits = write_head(model.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state)
    predicting = logits[:, memory.shape[1] - 1 : -1]
    return F.cross_entropy(predicting.transpose(1, 2), ids, reduction="none").mean(1)


def meta_loss(
    model: PreTrainedModel,
    write_head: nn.Module,
    initial_memory: Tensor,
    inner_lr: float,
    steps: int,
    context: Tensor,
    queries: Tensor,
    labels: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write by gradient descent and read one query of each context; gradients flow through everything.

    Parameters
    ----------
    initial_memory : Tensor, shape (m, d)
    context : Tensor, int64, shape (batch, length)
    queries, labels : Tensor, int64, shape (batch, query length)
        Query and target tokens; labels are -100 outside the targets.

    Returns
    -------
    read loss : Tensor, mean over the target tokens
    last write loss : Tensor, mean over the batch
    """
    memory = initial_memory.repeat(len(context), 1, 1)
    losses = torch.zeros(len(context))
    for _ in range(steps):
        losses = write_loss(model, write_head, memory, context)
        (gradient,) = torch.autograd.grad(losses.sum(), memory, create_graph=True)
        memory = memory - inner_lr * gradient
    embeds = torch.cat([memory, model.get_input_embeddings()(queries)], dim=1)
    logits = model(inputs_embeds=embeds, use_cache=False).logits[:, memory.shape[1] - 1 : -1]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100), losses.mean()
