"""Replace the forward of a model's modules by operations whose second or third derivatives are better."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import gated_mlp, rms_norm

Forward = Callable[[Any, Tensor], Tensor]
FORMS = [gated_mlp, rms_norm]


def closed_forms(model: nn.Module) -> dict[nn.Module, Forward]:
    """Find the modules that an operation here can replace, by comparing both on an input; return their forwards."""
    return {
        module: form.forward
        for module in model.modules()
        for form in FORMS
        if form.matches(module) and _agrees(module, form.forward)
    }


def open_forms(model: nn.Module) -> dict[nn.Module, Forward]:
    """Return forwards for the modules whose own have a wrong third derivative: layer norms.

    PyTorch's takes mean and deviation as constants in it, without a warning.
    """
    return {module: _layer_norm for module in model.modules() if type(module) is nn.LayerNorm}


def _layer_norm(module: nn.LayerNorm, hidden: Tensor) -> Tensor:
    axes = tuple(range(-len(module.normalized_shape), 0))
    centred = hidden - hidden.mean(axes, keepdim=True)
    scaled = centred * (centred.square().mean(axes, keepdim=True) + module.eps).rsqrt()
    scaled = scaled if module.weight is None else scaled * module.weight
    return scaled if module.bias is None else scaled + module.bias


@contextmanager
def patched(forms: dict[nn.Module, Forward]) -> Iterator[None]:
    """Replace the forward of these modules within a context."""
    # Some libraries set a forward on the instance as well.
    before = {module: vars(module).get("forward") for module in forms}
    for module, forward in forms.items():
        module.forward = forward.__get__(module)
    try:
        yield
    finally:
        for module, own in before.items():
            if own is None:
                del module.forward
            else:
                module.forward = own


def _agrees(module: nn.Module, forward: Forward) -> bool:
    weight = next(module.parameters())
    probe = torch.linspace(-2, 2, 3 * weight.shape[-1], device=weight.device).sin().view(3, -1).to(weight.dtype)
    with torch.no_grad():
        wanted, found = module(probe), forward(module, probe)
    tolerance = torch.finfo(weight.dtype).eps ** 0.5
    return torch.allclose(found, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))
