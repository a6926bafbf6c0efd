"""One step of meta-training: write, read, and the outer loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batch import Batch
from ..methods.base import Method
from ..tasks.base import exact_match
from .recipe import Precision


def outer_loss(loss: Tensor, write_loss: Tensor, weight: float) -> Tensor:
    """Read loss plus weighted write loss; with a weight of zero the write loss is not differentiated."""
    return loss + weight * write_loss if weight else loss


class MetaStep(nn.Module):
    """Write the contexts of a batch and read their targets; a module, so that data parallelism can wrap it."""

    def __init__(self, method: Method, precision: Precision = "fp32") -> None:
        super().__init__()
        self.method, self.precision = method, precision

    def forward(
        self, batch: Batch, steps: int, scored: Tensor, reconstruct: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Write and read a batch.

        Parameters
        ----------
        batch : Batch
        steps : int
            Write steps.
        scored : Tensor, bool, shape of `batch.labels`
            The positions that count for exact match, see `Task.scored`.
        reconstruct : bool
            Compute the write loss even if that takes a pass of its own; otherwise such a write loss is zero.

        Returns
        -------
        loss : Tensor
            Read loss, summed over the target tokens.
        write_loss : Tensor
            Scalar, see `Method.write_loss`.
        correct : Tensor, bool, shape (queries,)
            Exact match of each query.
        """
        # Not Accelerate's autocast, which has one precision for the life of the process.
        low = torch.autocast(batch.rows.device.type, torch.bfloat16, enabled=self.precision == "bf16")
        with low, self.method.backbone.training_attention():
            written = self.method.write(batch.context, steps)
            given = reconstruct or not self.method.reconstruction
            write_loss = self.method.write_loss(written, batch.context) if given else written.losses.new_zeros(())
            logits = self.method.read_targets(written.memory, batch)
        loss = F.cross_entropy(logits.float(), batch.answers, reduction="sum")
        correct = exact_match(logits.detach().argmax(-1), batch, scored)
        return loss, write_loss, correct
