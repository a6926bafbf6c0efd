"""A prefix of cache entries of which single heads do not see all."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backbone import Backbone
from ...ops.head_attention import head_attention
from ...prefix import Prefix


class HeadPrefix(Prefix):
    """A prefix whose heads keep different numbers of entries.

    Parameters
    ----------
    plain : Prefix
        With room for the most entries of any head.
    backbone : Backbone
    hidden : Tensor, bool, shape (batch, layers, key-value heads, entries)
        True at places where a head has no entry.
    """

    def __init__(self, plain: Prefix, backbone: Backbone, hidden: Tensor) -> None:
        super().__init__(plain.last, plain.cache, plain.mask, plain.start)
        self.backbone, self.hidden = backbone, hidden

    def select(self, rows: Tensor) -> HeadPrefix:
        """Select rows in any order and any number of times; the original stays as it is."""
        return HeadPrefix(super().select(rows), self.backbone, self.hidden[rows])

    def cut(self, rows: Tensor) -> HeadPrefix:
        """Select rows of the same length and drop their pads; the original stays as it is."""
        chosen = super().cut(rows)
        return HeadPrefix(chosen, self.backbone, self.hidden[rows][..., : chosen.length])

    def join(self, others: Sequence[Prefix]) -> HeadPrefix:
        """Join the rows of this prefix and of others; see `Prefix.join`."""
        joined = super().join(others)
        hidden = [own.hidden for own in (self, *others) if isinstance(own, HeadPrefix)]
        padded = [F.pad(own, (0, joined.length - own.shape[-1]), value=True) for own in hidden]
        return HeadPrefix(joined, self.backbone, torch.cat(padded))

    @property
    def nbytes(self) -> int:
        """Bytes of the kept tensors."""
        return super().nbytes + self.hidden.nbytes

    def active(self) -> AbstractContextManager[Any]:
        """Return a context in which heads do not see what is hidden from them."""
        return head_attention(self.backbone.model, self.hidden)
