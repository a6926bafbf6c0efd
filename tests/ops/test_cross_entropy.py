"""Chunked cross-entropy against PyTorch's own on whole logits, and finite differences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from gradmem.errors import GradmemError
from gradmem.ops import cross_entropy as module
from gradmem.ops.cross_entropy import cross_entropy
from gradmem.ops.head import Head, ScaledHead
from helpers import distance

BATCH, LENGTH, WIDTH, VOCABULARY = 2, 7, 5, 11


def plain(hidden: Tensor, head: nn.Linear, ids: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)


def make(bias: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, nn.Linear, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=torch.float64)
        hidden = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64)
        ids = torch.randint(VOCABULARY, (BATCH, LENGTH))
    return hidden.to(dtype).requires_grad_(), head.to(dtype), ids


def write_and_read(function: Callable[..., Tensor], hidden: Tensor, head: Head, ids: Tensor) -> list[Tensor]:
    """Losses, their gradient, and the gradients through a gradient step as WRITE takes it."""
    layer = head.layer if isinstance(head, ScaledHead) else head
    losses = function(hidden, head, ids)
    weights = torch.linspace(0.5, 2, ids.numel(), dtype=losses.dtype).view(ids.shape)
    (grad,) = torch.autograd.grad((losses * weights).sum(), hidden, create_graph=True)
    after = function(hidden - 0.7 * grad, head, ids)
    return [
        losses,
        grad,
        *torch.autograd.grad((after * weights).sum() + 0.3 * losses.sum(), [hidden, *layer.parameters()]),
    ]


@pytest.fixture(params=[1, 3, 13])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Rows in a chunk: one, some that do not divide the rows, and all but one."""
    monkeypatch.setattr(module, "CHUNK", request.param * VOCABULARY)
    return request.param


@pytest.mark.parametrize("bias", [False, True])
def test_equals_plain(bias: bool, chunk: int) -> None:
    given = make(bias)
    for got, wanted in zip(write_and_read(cross_entropy, *given), write_and_read(plain, *given), strict=True):
        assert distance(got, wanted) < 1e-13


def plain_scaled(hidden: Tensor, head: ScaledHead, ids: Tensor) -> Tensor:
    logits = head.scale * head.layer(hidden)
    logits = logits if head.cap is None else head.cap * (logits / head.cap).tanh()
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "cap"), [(0.3, None), (2.0, 0.7), (1.0, 0.5)])
def test_scaled_and_capped_logits(scale: float, cap: float | None, bias: bool, chunk: int) -> None:
    """Values, gradients and gradients through a gradient step, with logits well into the cap."""
    hidden, layer, ids = make(bias)
    head = ScaledHead(layer, scale, cap)
    reference = head.finish(layer(hidden))
    assert cap is None or bool((reference.abs() > 0.8 * cap).any())
    found = write_and_read(cross_entropy, hidden, head, ids)
    for got, wanted in zip(found, write_and_read(plain_scaled, hidden, head, ids), strict=True):
        assert distance(got, wanted) < 1e-13


@pytest.mark.parametrize("bias", [False, True])
def test_finite_differences(bias: bool, chunk: int) -> None:
    hidden, head, ids = make(bias)
    assert torch.autograd.gradcheck(lambda h: cross_entropy(h, head, ids), hidden)
    head.requires_grad_(False)
    assert torch.autograd.gradgradcheck(lambda h: cross_entropy(h, head, ids), hidden)


@pytest.mark.parametrize("trained", [True, False])
def test_a_frozen_head_gets_no_gradient(trained: bool, chunk: int) -> None:
    hidden, head, ids = make(True)
    head.requires_grad_(trained)
    cross_entropy(hidden, head, ids).sum().backward()
    assert all((parameter.grad is not None) == trained for parameter in head.parameters())


def test_large_logits_stay_finite(chunk: int) -> None:
    hidden, head, ids = make(False)
    hidden = (hidden.detach() * 1e4).requires_grad_()
    for got, wanted in zip(
        write_and_read(cross_entropy, hidden, head, ids), write_and_read(plain, hidden, head, ids), strict=True
    ):
        assert got.isfinite().all()
        assert (got - wanted).norm() <= 1e-9 * wanted.norm() + 1e-12


def test_autocast(chunk: int) -> None:
    """Under bfloat16 autocast, no further from the truth than PyTorch's own."""
    hidden, head, ids = make(True, torch.float32)
    wanted = write_and_read(plain, hidden, head, ids)
    with torch.autocast("cpu", torch.bfloat16):
        got, reference = write_and_read(cross_entropy, hidden, head, ids), write_and_read(plain, hidden, head, ids)
    for mine, other, want in zip(got, reference, wanted, strict=True):
        assert mine.dtype == torch.float32
        assert distance(mine, want) < max(0.02, 1.5 * distance(other, want))


def test_what_is_not_supported_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 1)
    hidden, head, ids = make(False)
    losses = cross_entropy(hidden, head, ids)
    with pytest.raises(RuntimeError, match="gradient of its weight"):
        torch.autograd.grad(losses.sum(), head.weight, create_graph=True, retain_graph=True)
    (grad,) = torch.autograd.grad(losses.sum(), hidden, create_graph=True)
    with pytest.raises(GradmemError, match="no third derivative"):
        torch.autograd.grad((grad**2).sum(), hidden, create_graph=True)


def test_no_logits_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", VOCABULARY)
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        write_and_read(cross_entropy, *make(True))
    assert sizes
    assert max(sizes) <= BATCH * LENGTH * WIDTH


def test_other_layers_keep_their_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 1)
    hidden, head, ids = make(False)

    class Doubled(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return 2 * super().forward(hidden)

    doubled = Doubled(WIDTH, VOCABULARY, bias=False, dtype=torch.float64)
    doubled.load_state_dict(head.state_dict())
    assert distance(cross_entropy(hidden, doubled, ids), plain(hidden, doubled, ids)) < 1e-13
