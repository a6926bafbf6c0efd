"""Muon for many matrices at once against PyTorch's, one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradmem.training.optimizers import Muon, orthogonalized
from gradmem.training.state import load_state, save_state

SHAPES = [(8, 8), (8, 8), (24, 8), (8, 24), (24, 8), (8, 24), (5, 8), (8, 8)]
OPTIONS: list[dict[str, Any]] = [
    {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1},
    {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.0, "nesterov": False},
    {"lr": 0.02, "weight_decay": 0.3, "adjust_lr_fn": "match_rms_adamw", "ns_steps": 3},
]


class Matrices(nn.Module):
    """Matrices of several shapes, always the same."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.all = nn.ParameterList(torch.randn(shape, generator=generator) for shape in SHAPES)


def take(optimizer: torch.optim.Optimizer, module: Matrices, steps: range) -> None:
    """Steps with gradients drawn by their number; one matrix has none at every third."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for number, parameter in enumerate(module.all):
            grad = torch.randn(parameter.shape, generator=generator) * 10.0 ** (number - 4)
            parameter.grad = None if number == 1 and step % 3 == 0 else grad
        optimizer.step()


def moves(module: Matrices) -> list[Tensor]:
    return [after.detach() - before.detach() for after, before in zip(module.all, Matrices().all, strict=True)]


def assert_same(got: Matrices, wanted: Matrices) -> None:
    """To bfloat16, in which both compute updates of which each has a norm of its own."""
    for mine, theirs in zip(moves(got), moves(wanted), strict=True):
        assert (mine - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize("options", OPTIONS, ids=["default", "plain momentum", "as AdamW"])
def test_steps_are_those_of_pytorch(options: dict[str, Any]) -> None:
    mine, theirs = Matrices(), Matrices()
    take(Muon(mine.parameters(), **options), mine, range(5))
    take(torch.optim.Muon(theirs.parameters(), **options), theirs, range(5))
    assert_same(mine, theirs)


def test_a_run_resumes_from_what_pytorchs_muon_saved(tmp_path: Path) -> None:
    """And from its own state to the bit."""
    theirs, mine = Matrices(), Matrices()
    before = torch.optim.Muon(theirs.parameters(), **OPTIONS[0])
    take(before, theirs, range(3))
    save_state(tmp_path, 3, theirs, [before], {})
    after = Muon(mine.parameters())
    load_state(tmp_path / "step-00000003", mine, [after])
    save_state(tmp_path / "mine", 3, mine, [after], {})
    take(after, mine, range(3, 6))
    take(before, theirs, range(3, 6))
    assert_same(mine, theirs)
    again = Matrices()
    resumed = Muon(again.parameters())
    load_state(tmp_path / "mine" / "step-00000003", again, [resumed])
    take(resumed, again, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(again.all, mine.all, strict=True))


@pytest.mark.parametrize("shape", [(4, 6, 6), (2, 3, 9), (3, 9, 3)], ids=str)
def test_a_stack_is_orthogonalized_matrix_by_matrix(shape: tuple[int, ...]) -> None:
    """A matrix does not depend on those beside it, and its singular vectors stay."""
    matrices = (
        torch.randn(shape, generator=torch.Generator().manual_seed(1))
        * torch.tensor([1e-3, 1, 1e3, 5])[: shape[0], None, None]
    )
    found = orthogonalized(matrices, (3.4445, -4.7750, 2.0315), 5, 1e-7).float()
    for matrix, got in zip(matrices, found, strict=True):
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        within = u.mT @ got @ v.mT
        assert (within - within.diagonal().diag()).abs().max() < 0.1
        assert (within.diagonal() > 0.5).all()
        assert (within.diagonal() < 1.5).all()
