"""Mamba against transformers' own forward over the whole sequence, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gradmem.backbone import Backbone
from gradmem.batch import Tokens
from gradmem.errors import GradmemError
from gradmem.memory import Memory
from gradmem.methods import ARMT, RMT, FullContext, GradMem, Mamba
from gradmem.ops.selective_scan import PairScan, TokenScan, selective_scan
from gradmem.training import Recipe, Stage
from gradmem.training.optimizers import build_optimizers
from helpers import (
    TOLERANCE,
    VOCABULARY,
    assert_same_gradients,
    distance,
    gradients,
    make_batch,
    make_gradmem,
    make_method,
    random_tokens,
    real,
)

CONFIG = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "residual_in_fp32": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "biases": {"use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False},
    "sizes": {"conv_kernel": 2, "expand": 3, "time_step_rank": 5},
}


@pytest.fixture(autouse=True)
def whole_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers computes decay rates and biases in float32, even in a float64 model."""
    to_float = Tensor.float
    monkeypatch.setattr(Tensor, "float", lambda self: self if self.dtype == torch.float64 else to_float(self))


def make_mamba(**config: Any) -> Mamba:
    return make_method(Mamba, "mamba", config=CONFIG | config)


def whole(method: Mamba, *parts: Tensor) -> Tensor:
    """Logits by transformers alone of one sequence in one piece, shape (length, vocabulary)."""
    model = method.backbone.model
    return model.get_output_embeddings()(model.base_model(torch.cat(parts)[None]).last_hidden_state)[0]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("lengths", [[7, 9], [1, 2]], ids=str)
def test_write_and_read_equal_one_forward(name: str, lengths: list[int]) -> None:
    """Values and all gradients; contexts may be shorter than the convolution."""
    method = make_mamba(**VARIANTS[name])
    context, queries = random_tokens(lengths), random_tokens([5, 3], 1)
    logits = method.read(method.write(context).memory, queries)
    got, wanted = 0.0, 0.0
    for row, length in enumerate(lengths):
        ids = real(queries, row)
        reference = whole(method, real(context, row), ids)[length:]
        assert distance(logits[row, 1 : len(ids) + 1], reference) < TOLERANCE
        weights = torch.randn(reference.shape, generator=torch.Generator().manual_seed(row), dtype=torch.double)
        got, wanted = got + (logits[row, 1 : len(ids) + 1] * weights).sum(), wanted + (reference * weights).sum()
    assert_same_gradients(gradients(got, method), gradients(wanted, method))


def scanned(length: int) -> list[Tensor]:
    """Two sequences for a scan: inputs, step sizes, rates, what is written and read, and the state before."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, length, 3), (2, length, 3), (3, 5), (2, length, 5), (2, length, 5), (2, 3, 5)]
    x, dt, a, b, c, state = (torch.randn(shape, generator=generator, dtype=torch.double) for shape in shapes)
    return [tensor.requires_grad_() for tensor in (x, dt.abs(), -a.abs(), b, c, state)]


@pytest.mark.parametrize("scan", [TokenScan, PairScan])
def test_the_scan_has_the_gradients_of_finite_differences(scan: type[torch.autograd.Function]) -> None:
    """Of the outputs and of the state after the last token, for everything that it is given."""
    assert torch.autograd.gradcheck(scan.apply, scanned(4))


@pytest.mark.parametrize("length", [1, 2, 3, 6, 7, 8, 9, 21])
def test_both_scans_agree(length: int) -> None:
    """On sequences of any length, in outputs, last states and all gradients."""
    given = scanned(length)
    outputs = [scan.apply(*given) for scan in (TokenScan, PairScan)]
    losses = [y.sin().sum() + (state**2).sum() for y, state in outputs]
    for got, wanted in zip(outputs[1], outputs[0], strict=True):
        assert distance(got, wanted) < TOLERANCE
    grads = [torch.autograd.grad(loss, given) for loss in losses]
    for got, wanted in zip(grads[1], grads[0], strict=True):
        assert distance(got, wanted) < TOLERANCE


def test_the_scan_goes_token_by_token_on_a_cpu() -> None:
    assert selective_scan(*scanned(3))[0].grad_fn.name().startswith("TokenScan")


def test_memory_is_the_state_of_transformers() -> None:
    method, context = make_mamba(), random_tokens([7, 2, 9])
    memory = method.write(context).memory
    for row in range(3):
        cache = method.backbone.model.base_model(real(context, row)[None], use_cache=True).cache_params
        for layer in range(2):
            conv = cache.get_conv_state(layer)[0].mT
            assert distance(memory.tensors["conv"][row, layer], conv[-3:]) < TOLERANCE
            assert distance(memory.tensors["ssm"][row, layer], cache.get_recurrent_state(layer)[0]) < TOLERANCE


def test_token_losses_continue_the_context() -> None:
    """The context read after itself; nothing predicts its first token."""
    method, context = make_mamba(), random_tokens([7, 5])
    losses = method.token_losses(method.write(context).memory, context)
    for row in range(2):
        ids = real(context, row)
        wanted = F.cross_entropy(whole(method, ids, ids[:-1])[len(ids) :], ids[1:], reduction="none")
        assert distance(losses[row, 1 : len(ids)], wanted) < TOLERANCE
        assert losses[row, 0].item() == pytest.approx(math.log(VOCABULARY))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
def test_generate_equals_transformers(options: dict[str, int]) -> None:
    method, context = make_mamba(), make_batch().context
    queries, rows = [[3, 1, 4, 1, 5], [9], [2, 6]], [2, 0, 1]
    settings = {"max_new_tokens": 4, "do_sample": False} | options
    got = method.generate(method.write(context).memory, queries, torch.tensor(rows), **settings)
    wanted = []
    for query, row in zip(queries, rows, strict=True):
        ids = torch.cat([real(context, row), torch.tensor(query)])[None]
        found = method.backbone.model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **settings)
        wanted += found[:, ids.shape[1] :].tolist()
    assert got == wanted


def test_sampling() -> None:
    method = make_mamba()
    memory = method.write(random_tokens([7])).memory
    torch.manual_seed(0)
    settings = {"do_sample": True, "num_return_sequences": 8, "temperature": 5.0, "max_new_tokens": 6}
    assert len(set(map(tuple, method.generate(memory, [[1, 2]], **settings)))) > 1


def test_any_context_fits() -> None:
    method = make_mamba()
    memory = method.write(random_tokens([300])).memory
    assert memory.nbytes == method.write(Tokens.from_lists([[1]])).memory.nbytes == 2 * 8 * 32 * (3 + 4)


def test_other_backbones_are_refused() -> None:
    with pytest.raises(GradmemError, match="model_type: mamba"):
        Mamba(make_gradmem("llama").backbone)
    fields = {"model_type": "mamba2", "num_heads": 4, "head_dim": 8, "n_groups": 1, "hidden_size": 16, "vocab_size": 5}
    mamba2 = Backbone.from_config(fields | {"state_size": 4, "num_hidden_layers": 1})
    with pytest.raises(GradmemError, match="model_type: mamba"):
        Mamba(mamba2)


@pytest.mark.parametrize("cls", [GradMem, FullContext, RMT, ARMT])
def test_methods_of_attention_refuse_mamba(cls: Any) -> None:
    with pytest.raises(GradmemError, match="model_type: llama"):
        cls(make_mamba().backbone)


def test_states_of_another_size_are_refused() -> None:
    method = make_mamba()
    memory = method.write(random_tokens([3])).memory
    with pytest.raises(GradmemError, match="it holds"):
        method.check(Memory({**memory.tensors, "conv": memory.tensors["conv"][:, :1]}), "it")


def test_muon_takes_the_matrices_only() -> None:
    """Decay rates are a table that multiplies no vector."""
    method = make_mamba(tie_word_embeddings=False)
    recipe = Recipe(task={"name": "kv"}, backbone={}, method={"name": "mamba"}, stages=[Stage(1, [1])])
    muon, adamw = (
        {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for optimizer in build_optimizers(method, recipe)
    )
    assert len(muon) == 2 * 4
    assert len(muon) + len(adamw) == len(list(method.parameters()))
    assert {id(parameter) for name, parameter in method.named_parameters() if name.endswith("A_log")} <= adamw


def test_reconstruction_equals_one_forward_over_the_context_twice() -> None:
    """The first token is guessed: a state predicts nothing."""
    method, context = make_mamba(tie_word_embeddings=False), make_batch().context
    written = method.write(context)
    assert method.write_loss(written, context) == 0
    method.reconstruction = True
    naive = []
    for row, length in zip(context.ids, context.lengths.tolist(), strict=True):
        logits = whole(method, row[:length], row[:length])[length:-1]
        known = F.cross_entropy(logits, row[1:length], reduction="sum")
        naive.append((known + math.log(VOCABULARY)) / length)
    assert distance(method.write_loss(written, context), torch.stack(naive).mean()) < TOLERANCE
