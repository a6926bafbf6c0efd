"""LoRA adapters that are active in one phase only, WRITE or READ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ...backbone import Backbone
from ...errors import GradmemError
from ...lora import adapted_layers, inject
from ...prefix import Prefix
from .prefix_method import Phase


class AdaptedPrefix(Prefix):
    """A prefix that was run with the adapters of READ; they are also active for what follows it."""

    def __init__(self, plain: Prefix, adapters: list[Any]) -> None:
        super().__init__(plain.last, plain.cache, plain.mask, plain.start)
        self.plain, self.adapters = plain, adapters

    def select(self, rows: Tensor) -> Prefix:
        """Select rows in any order and any number of times; the original stays as it is."""
        return AdaptedPrefix(self.plain.select(rows), self.adapters)

    def join(self, others: Sequence[Prefix]) -> Prefix:
        """Join the rows of this prefix and of others; see `Prefix.join`."""
        return AdaptedPrefix(self.plain.join([getattr(one, "plain", one) for one in others]), self.adapters)

    @property
    def nbytes(self) -> int:
        """Bytes of the kept tensors."""
        return self.plain.nbytes

    @contextmanager
    def active(self) -> Iterator[None]:
        """Run what follows with the adapters of READ, and as the prefix without them asks for."""
        with self.plain.active(), active_adapters(self.adapters, "read"):
            yield


def add_lora(backbone: Backbone, ranks: dict[Phase, int]) -> list[Any]:
    """Add LoRA adapters to all linear layers of the blocks, one for each phase, and deactivate them.

    Parameters
    ----------
    backbone : Backbone
    ranks : dict of int
        Rank of the adapters of each phase that has any.

    Returns
    -------
    list of peft layers
        The layers that have adapters.
    """
    if not ranks:
        return []
    if backbone.has_lora:
        raise GradmemError("write_lora and read_lora need a backbone without `lora`: leave out one of them")
    trainable = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    for phase, rank in ranks.items():
        inject(backbone.model, rank, phase)
    layers = [layer for *_, layer in adapted_layers(backbone)]
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_("lora_" in name or name.replace(".base_layer", "") in trainable)
    _switch(layers, None)
    return layers


def _switch(layers: list[Any], phase: Phase | None) -> None:
    # peft's own set_adapter() would also clear requires_grad of the other adapters' weights.
    for layer in layers:
        layer._active_adapter = [phase] if phase in layer.lora_A else []


@contextmanager
def active_adapters(layers: list[Any], phase: Phase) -> Iterator[None]:
    """Activate the adapters of a phase, if it has any, and deactivate all of them afterwards."""
    _switch(layers, phase)
    try:
        yield
    finally:
        _switch(layers, None)
