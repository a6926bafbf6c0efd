"""Base of methods whose memory stands in the place of a text, and which can be asked to repeat it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...batch import Tokens
from ...compaction.text import repeat_query
from ...memory import Memory
from .method import Method

ROOM = 64
"""Positions for what stands between a text and its repetition."""


class Repeating(Method):
    """Base of methods that answer questions about any text, and repeat it when they are asked to."""

    task_name = "document"
    questions: Sequence[str] | None = ()

    @property
    def max_context(self) -> int:
        """Longest context in tokens: so that it can be repeated after itself."""
        return max(0, self.backbone.max_full_attention - len(self.before_context) - ROOM) // 2

    def texts_at_once(self, length: int) -> int:
        """One: what is known of a text takes more room than its cache."""
        return 1

    def token_losses(self, memory: Memory, context: Tokens) -> Tensor:
        """Compute the loss of each token of the text when the model is asked to repeat it: (batch, length), in nats."""
        return self.repeat_losses(self.prefix(memory), context, repeat_query(self.task))

    @torch.no_grad()
    def reconstruct(self, memory: Memory, lengths: Sequence[int]) -> list[list[int]]:
        """Let the model repeat the texts by greedy decoding; see `Method.reconstruct`."""
        query = repeat_query(self.task)
        return self.repeat(memory, lengths, query) if query else super().reconstruct(memory, lengths)
