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
    """Read loss plus weighted write loss; with a weight of zero the write loss is not differentiated at all."""
    return loss + weight * write_loss if weight else loss


class MetaStep(nn.Module):
    """Write a batch and read its targets; a module, so that data parallelism can wrap it."""

    def __init__(self, method: Method, precision: Precision = "fp32") -> None:
        super().__init__()
        self.method, self.precision = method, precision

    def forward(
        self, batch: Batch, steps: int, scored: Tensor, reconstruct: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return read loss summed over target tokens, the write loss, and exact match by query.

        A write loss that takes a pass of its own is left out, and zero, without `reconstruct`.
        """
        # Not Accelerate's own autocast: its precision is one for the life of the process.
        low = torch.autocast(batch.rows.device.type, torch.bfloat16, enabled=self.precision == "bf16")
        with low, self.method.backbone.training_attention():
            written = self.method.write(batch.context, steps)
            given = reconstruct or not self.method.reconstruction
            write_loss = self.method.write_loss(written, batch.context) if given else written.losses.new_zeros(())
            logits = self.method.read_targets(written.memory, batch)
        loss = F.cross_entropy(logits.float(), batch.answers, reduction="sum")
        correct = exact_match(logits.detach().argmax(-1), batch, scored)
        return loss, write_loss, correct
