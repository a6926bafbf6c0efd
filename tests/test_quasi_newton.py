"""Quasi-Newton steps against BFGS with whole matrices in NumPy, and finite differences."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from gradmem.inner import descend
from gradmem.inner.optimizers import SECANTS, TRUST, quasi_newton, sgd

BATCH, WIDTH = 3, 4
RANDOM = np.random.default_rng(0)
W = 0.7 * RANDOM.normal(size=(WIDTH, WIDTH))
START = {name: 0.7 * RANDOM.normal(size=(BATCH, WIDTH)) for name in "xz"}
TARGET = np.linspace(-1, 1, WIDTH)


def dense_bfgs(start: np.ndarray, rates: np.ndarray, plain: int, steps: int) -> list[np.ndarray]:
    """The same for one sample of the nonlinear problem, x and z in a row, with inverse Hessians as whole matrices."""
    points, slopes = [start], []
    for step in range(steps):
        x, z = points[-1].reshape(2, WIDTH)
        slope = np.tanh(W @ x + z - TARGET)
        slopes.append(np.concatenate([W.T @ slope, slope + 0.2 * z]))
        inverse, move = np.diag(rates), -rates * slopes[-1]
        if step >= plain:
            for moved, turned in list(zip(np.diff(points, axis=0), np.diff(slopes, axis=0), strict=True))[-SECANTS:]:
                projector = np.eye(2 * WIDTH) - np.outer(turned, moved) / (moved @ turned)
                inverse = projector.T @ inverse @ projector + np.outer(moved, moved) / (moved @ turned)
            move = -inverse @ slopes[-1]
            move *= min(1, TRUST * np.linalg.norm(points[-1] - start) / np.linalg.norm(move)) if step else 1
        points.append(points[-1] + move)
    return points


@pytest.mark.parametrize("plain", [0, 1, 3])
def test_quasi_newton_steps_are_those_of_dense_bfgs(plain: int) -> None:
    start = {name: torch.tensor(START[name]) for name in "xz"}
    rates = {"x": torch.linspace(0.1, 0.4, WIDTH, dtype=torch.float64), "z": 0.2}

    def loss(t: dict[str, Tensor]) -> Tensor:
        u = t["x"] @ torch.tensor(W).T + t["z"] - torch.tensor(TARGET)
        return u.cosh().log().sum(1) + 0.1 * (t["z"] ** 2).sum(1)

    got = [step.tensors for step in descend(loss, start, quasi_newton(sgd, plain), lambda step: rates, 7)]
    for row in range(BATCH):
        wanted = dense_bfgs(
            np.concatenate([START["x"][row], START["z"][row]]),
            np.concatenate([rates["x"], np.full(WIDTH, 0.2)]),
            plain,
            7,
        )
        for tensors, point in zip(got, wanted, strict=True):
            np.testing.assert_allclose(torch.cat([tensors["x"][row], tensors["z"][row]]).detach(), point, rtol=1e-9)


def test_quasi_newton_can_be_differentiated() -> None:
    def outer(start: Tensor, rate: Tensor) -> Tensor:
        *_, last = descend(
            lambda t: (t["x"] - 1).cosh().log().sum(1) + 0.1 * (t["x"] ** 2).sum(1).sin(),
            {"x": start},
            quasi_newton(sgd, 2),
            lambda step: {"x": rate},
            5,
        )
        return last.tensors["x"].sin().sum()

    point = torch.tensor(START["x"], requires_grad=True)
    assert torch.autograd.gradcheck(outer, (point, torch.tensor([0.3], dtype=torch.float64, requires_grad=True)))


def test_quasi_newton_goes_along_a_bend_without_positive_curvature_and_rests_where_there_is_no_slope() -> None:
    """On a concave parabola secants tell nothing of a minimum; a sample at the top has nowhere to go."""
    start = torch.tensor([[0.5, -0.2], [0.0, 0.0]], dtype=torch.float64)
    states = [
        step.tensors["x"].detach()
        for step in descend(
            lambda t: -(t["x"] ** 2).sum(1), {"x": start}, quasi_newton(sgd, 1), lambda step: {"x": 0.1}, 4
        )
    ]
    for before, after in pairwise(states[:2]):
        torch.testing.assert_close(after, before * 1.2)
    for before, after in pairwise(states[1:]):
        torch.testing.assert_close(after[0], before[0] + TRUST * (before - start)[0])
        assert not after[1].any()
