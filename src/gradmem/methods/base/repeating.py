"""Base of methods whose memory stands in the place of a text, and which can be asked to repeat it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...batch import Tokens
from ...compaction.text import repeat_query
from ...inner.objective import token_losses
from ...memory import Memory
from ...prefix import Prefix
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
        return self.repeat_losses(self.prefix(memory), context)

    def repeat_losses(self, prefix: Prefix, context: Tokens) -> Tensor:
        """The `token_losses` after the prefix of a memory."""
        query = torch.tensor(repeat_query(self.task), dtype=torch.long, device=context.ids.device)
        query = query.expand(len(context), -1)
        ids = torch.cat([query, context.ids[:, :-1]], 1)
        mask = torch.cat([torch.ones_like(query, dtype=torch.bool), context.mask[:, :-1]], 1)
        hidden = self.read_hidden(prefix, Tokens(ids, mask))[:, query.shape[1] :]
        return token_losses(hidden, self.backbone.head, context.ids, context.mask)

    @torch.no_grad()
    def reconstruct(self, memory: Memory, lengths: Sequence[int]) -> list[list[int]]:
        """Let the model repeat the texts by greedy decoding; see `Method.reconstruct`."""
        query, found = repeat_query(self.task), []
        if not query:
            return super().reconstruct(memory, lengths)
        for row, length in enumerate(lengths):
            options: dict[str, Any] = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False}
            found += self.generate(memory[row], [query], pad_id=self.task.pad_id, **options)
        return found
