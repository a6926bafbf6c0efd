"""Prefixes of the memories that were asked last, kept within a budget of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

import torch

from ..memory import Memory
from ..methods.base import Method
from ..prefix import Prefix


class Prefixes:
    """What READ has run of each memory; those not asked for longest make room for others.

    Parameters
    ----------
    method : Method
    budget : int
        Bytes to keep at most; a larger prefix is not kept.
    """

    def __init__(self, method: Method, budget: int) -> None:
        self.method, self.budget = method, budget
        self.nbytes = 0
        self._kept: OrderedDict[Hashable, Prefix] = OrderedDict()

    def get(self, key: Hashable, memory: Memory) -> Prefix:
        """The prefix of a memory, which is run where it is not kept under this key."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        with torch.no_grad():
            prefix = self.method.prefix(memory)
        if prefix.nbytes <= self.budget:
            self._kept[key] = prefix
            self.nbytes += prefix.nbytes
        while self.nbytes > self.budget:
            _, oldest = self._kept.popitem(last=False)
            self.nbytes -= oldest.nbytes
        return prefix
