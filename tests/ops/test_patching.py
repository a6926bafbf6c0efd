"""Gated MLPs and RMS norms in closed form against PyTorch's own derivatives, and their place in models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from gradmem.backbone import Backbone
from gradmem.ops.attention import NAME
from gradmem.ops.gated_mlp import gated
from gradmem.ops.patching import OpenLayerNorm, closed_forms, patched
from gradmem.ops.rms_norm import rms_norm
from helpers import COMMON, CONFIGS, KINDS, WIDE, distance

EPS = 0.1


def plain_gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def plain_norm(hidden: Tensor, weight: Tensor) -> Tensor:
    return weight * hidden / (hidden.square().mean(-1, keepdim=True) + EPS).sqrt()


FORMS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "gated": (gated, plain_gated, [(2, 3, 5), (2, 3, 5)]),
    "rms_norm": (lambda x, w: rms_norm(x, w, EPS), plain_norm, [(2, 3, 5), (5,)]),
}


def inputs(name: str, dtype: torch.dtype = torch.float64, scale: float = 2.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in FORMS[name][2]]
    return [(scale * tensor).to(dtype).requires_grad_() for tensor in drawn]


def derivatives(function: Callable[..., Tensor], given: list[Tensor], used: int = 2) -> list[Tensor]:
    """Output, gradient, and the gradient of a function of the output and of the first `used` gradients."""
    out = function(*given)
    first = torch.autograd.grad((out**2).sum() + out[0].sum(), given[:used], create_graph=True)
    total = sum(((1 + i) * grad**2).sum() + grad.sin().sum() for i, grad in enumerate(first)) + (out**3).sum()
    return [out, *first, *torch.autograd.grad(total, given)]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("used", [1, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_equals_plain(name: str, used: int, dtype: torch.dtype, tolerance: float) -> None:
    ours, plain, _ = FORMS[name]
    wanted = derivatives(plain, inputs(name, dtype), used)
    for got, want in zip(derivatives(ours, inputs(name, dtype), used), wanted, strict=True):
        assert got.dtype == dtype
        assert distance(got, want) < tolerance


@pytest.mark.parametrize("name", FORMS)
def test_finite_differences(name: str) -> None:
    assert torch.autograd.gradcheck(FORMS[name][0], inputs(name))
    assert torch.autograd.gradgradcheck(FORMS[name][0], inputs(name))


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("scale", [0.0, 1e-6, 100.0])
def test_extreme_inputs_stay_finite(name: str, scale: float) -> None:
    assert all(tensor.isfinite().all() for tensor in derivatives(FORMS[name][0], inputs(name, scale=scale)))


@pytest.mark.parametrize("name", FORMS)
def test_third_derivative_is_refused(name: str) -> None:
    given = inputs(name)
    (grad,) = torch.autograd.grad((FORMS[name][0](*given) ** 2).sum(), given[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="third"):
        torch.autograd.grad(grad.sum(), given[:1], create_graph=True)


def test_half_precision_norms_are_computed_in_float32() -> None:
    given = inputs("rms_norm", torch.bfloat16)
    wanted = plain_norm(*(tensor.float() for tensor in given))
    assert distance(rms_norm(*given, EPS).float(), wanted) < 0.01
    assert all(tensor.dtype == torch.bfloat16 for tensor in derivatives(FORMS["rms_norm"][0], given))


# Models


def model(kind: str, **config: Any) -> PreTrainedModel:
    built = AutoConfig.for_model(kind, **COMMON | CONFIGS[kind] | config)
    return AutoModelForCausalLM.from_config(built).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_models_compute_the_same(kind: str) -> None:
    built, ids = model(kind), torch.arange(12)[None]
    wanted, forms = built(ids).logits, closed_forms(built)
    assert len(forms) == (2 + 5 if kind in ("llama", "qwen2") else 0)
    with patched(forms):
        assert all("forward" in vars(module) for module in forms)
        assert distance(built(ids).logits, wanted) < 1e-5
    assert not any("forward" in vars(module) for module in forms)


def test_a_forward_of_the_instance_comes_back() -> None:
    built = model("llama")
    norm = built.model.norm
    norm.forward = own = lambda hidden: type(norm).forward(norm, hidden)
    with patched(closed_forms(built)):
        assert norm.forward is not own
    assert norm.forward is own


def test_other_formulas_are_left_alone() -> None:
    built = model("llama", hidden_act="gelu")
    assert len(closed_forms(built)) == 5
    mlp = built.model.layers[0].mlp
    mlp.forward = lambda hidden: 0.5 * type(mlp).forward(mlp, hidden)
    built.model.norm.forward = lambda hidden: 1 + hidden
    assert len(closed_forms(built)) == 4


def test_experts_with_stacked_weights_are_left_alone() -> None:
    """Parts of the same names that are parameters, as mixtures of experts have them."""

    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for part in ("gate_proj", "up_proj", "down_proj"):
                setattr(self, part, torch.nn.Parameter(torch.ones(2, 3, 3)))
            self.act_fn = torch.nn.SiLU()

    assert closed_forms(Experts()) == {}


def test_a_model_with_attention_of_its_own_keeps_it() -> None:
    config = AutoConfig.for_model("llama", **COMMON | WIDE | {"num_attention_heads": 2})
    assert Backbone(LlamaForCausalLM(config)).double_backward_attention == NAME
    built = LlamaForCausalLM(config)
    whole = type(built.model.layers[0].self_attn).forward

    def other(self: Any, *given: Any, **options: Any) -> Any:
        """As if this model knew one implementation only."""
        out, weights = whole(self, *given, **options)
        return (out if self.config._attn_implementation != NAME else 2 * out), weights

    for layer in built.model.layers:
        layer.self_attn.forward = other.__get__(layer.self_attn)
    assert Backbone(built).double_backward_attention == "eager"


@pytest.mark.parametrize("affine", [True, False])
def test_layer_norms_have_the_third_derivative_of_finite_differences(affine: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, *weights = (torch.randn(3, 6, generator=generator, dtype=torch.float64) for _ in range(5))
    norm = torch.nn.LayerNorm(6, elementwise_affine=affine, dtype=torch.float64)

    def second(at: Tensor) -> tuple[Tensor, Tensor]:
        at = at.detach().requires_grad_()
        value = norm(at)
        for weight in weights[:2]:
            (value,) = torch.autograd.grad((value * weight).sum(), at, create_graph=True)
        return (value * weights[2]).sum(), at

    wanted = norm(hidden)
    with OpenLayerNorm():
        torch.testing.assert_close(norm(hidden), wanted)
        value, at = second(hidden)
        (found,) = torch.autograd.grad(value, at)
        step = 1e-5 * weights[3]
        slope = (second(hidden + step)[0] - second(hidden - step)[0]) / 2e-5
    assert (found * weights[3]).sum().item() == pytest.approx(slope.item(), rel=1e-6)
