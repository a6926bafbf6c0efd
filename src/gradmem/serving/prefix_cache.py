"""A cache of the prefixes of memories, limited in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

import torch

from ..model import BoundMemory
from ..prefix import Prefix


class PrefixCache:
    """Keeps the prefixes that READ computed, and evicts the least recently used.

    Parameters
    ----------
    budget : int
        Most bytes to keep. A larger prefix is not cached.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.nbytes = 0
        self._entries: OrderedDict[Hashable, Prefix] = OrderedDict()

    def get(self, key: Hashable, memory: BoundMemory) -> Prefix:
        """Return the prefix of a memory. Compute it if the cache has none under this key."""
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key]
        with torch.no_grad():
            prefix = memory.model.method.prefix(memory)
        if prefix.nbytes <= self.budget:
            self._entries[key] = prefix
            self.nbytes += prefix.nbytes
        while self.nbytes > self.budget:
            _, oldest = self._entries.popitem(last=False)
            self.nbytes -= oldest.nbytes
        return prefix
