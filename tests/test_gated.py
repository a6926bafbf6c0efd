"""Gated MLPs in closed form against PyTorch's own derivatives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from conftest import COMMON, CONFIGS, KINDS, WIDE, distance
from gradmem.backbone import Backbone
from gradmem.inner.attention import NAME
from gradmem.inner.gated import closed_form, gated, gated_mlps


def plain(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(3 * torch.randn(4, 5, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_() for _ in "gu"]


def derivatives(function: object, given: list[Tensor]) -> list[Tensor]:
    out = function(*given)  # type: ignore[operator]
    first = torch.autograd.grad((out**2).sum(), given, create_graph=True)
    total = (first[0] ** 2).sum() + first[1].sin().sum() + out.sum()
    return [out, *first, *torch.autograd.grad(total, given)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_equals_plain(dtype: torch.dtype, tolerance: float) -> None:
    for got, wanted in zip(derivatives(gated, inputs(dtype)), derivatives(plain, inputs(dtype)), strict=True):
        assert got.dtype == dtype
        assert distance(got, wanted) < tolerance


def test_finite_differences() -> None:
    assert torch.autograd.gradcheck(gated, inputs())
    assert torch.autograd.gradgradcheck(gated, inputs())


def test_large_inputs_stay_finite() -> None:
    given = [(100 * tensor).detach().requires_grad_() for tensor in inputs()]
    assert all(tensor.isfinite().all() for tensor in derivatives(gated, given))


def test_third_derivative_is_refused() -> None:
    gate, up = inputs()
    (grad,) = torch.autograd.grad(gated(gate, up).sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="third"):
        torch.autograd.grad(grad.sum(), gate, create_graph=True)


@pytest.mark.parametrize("kind", KINDS)
def test_models_compute_the_same(kind: str) -> None:
    config = AutoConfig.for_model(kind, **COMMON | CONFIGS[kind])
    model = AutoModelForCausalLM.from_config(config).double().eval()
    ids = torch.arange(12)[None]
    wanted, mlps = model(ids).logits, gated_mlps(model)
    assert len(mlps) == (2 if kind in ("llama", "qwen2") else 0)
    with closed_form(mlps):
        assert all("forward" in vars(mlp) for mlp in mlps)
        assert distance(model(ids).logits, wanted) < 1e-12
    assert not any("forward" in vars(mlp) for mlp in mlps)


def test_other_activations_are_left_alone() -> None:
    config = AutoConfig.for_model("llama", **COMMON | WIDE | {"num_attention_heads": 2, "hidden_act": "gelu"})
    assert gated_mlps(AutoModelForCausalLM.from_config(config)) == []


@pytest.mark.parametrize("part", ["mlp", "attention"])
def test_a_model_that_computes_otherwise_keeps_its_own(part: str) -> None:
    config = AutoConfig.for_model("llama", **COMMON | WIDE | {"num_attention_heads": 2})
    assert Backbone(LlamaForCausalLM(config)).second_order_attention == NAME
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        if part == "mlp":
            layer.mlp.register_forward_pre_hook(lambda module, given: None)
            layer.mlp.__class__ = type("Scaled", (type(layer.mlp),), {"forward": scaled})
        else:
            layer.self_attn.scaling = None
            layer.self_attn.__class__ = type("Own", (type(layer.self_attn),), {"forward": own_attention})
    backbone = Backbone(model)
    assert backbone.second_order_attention == ("eager" if part == "mlp" else NAME)
    assert len(backbone.gated_mlps) == (0 if part == "mlp" else 2)


def scaled(self: torch.nn.Module, hidden: Tensor) -> Tensor:
    """An MLP with the same parts and another formula."""
    return 0.5 * self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))


def own_attention(self: torch.nn.Module, hidden_states: Tensor, **options: object) -> tuple[Tensor, None]:
    """Attention that asks no interface."""
    return self.o_proj(self.v_proj(hidden_states).cumsum(1)), None
