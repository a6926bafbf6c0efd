"""`descend` against closed forms, hand-written NumPy and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradmem.inner import Step, descend, token_losses
from gradmem.inner.objective import sample_losses
from gradmem.inner.optimizers import OPTIMIZERS, Rates, clip, sgd
from gradmem.training.plan import AUTO

ORDERS = ["second", "first", "none"]
BATCH, WIDTH, STEPS = 3, 4, 4


def final(*args: Any, **options: Any) -> Step:
    *_, last = descend(*args, **options)
    return last


def constant(**rates: float | Tensor) -> Callable[[int], Rates]:
    """The same rates at every step."""
    return lambda step: rates


def gradients(value: Tensor, *wanted: Tensor) -> list[np.ndarray]:
    """Gradients as arrays; an unused tensor has gradient zero."""
    grads = torch.autograd.grad(value, wanted, allow_unused=True)
    return [(torch.zeros_like(w) if g is None else g).numpy() for g, w in zip(grads, wanted, strict=True)]


# --- A quadratic, where the descent and its derivatives are matrix powers ---------------------------------


@pytest.mark.parametrize(
    ("order", "last_k"), [("second", None), ("second", 2), ("second", 0), ("second", 9), ("first", None)]
)
def test_quadratic_closed_form(order: str, last_k: int | None) -> None:
    """L = (x - c)' A (x - c) / 2, so x_K - c = P^K (x_0 - c) with P = 1 - lr A, for each sample."""
    random = np.random.default_rng(0)
    root = random.normal(size=(WIDTH, WIDTH))
    curvature, rate = root @ root.T, 0.05
    start, centre, outer = random.normal(size=(3, BATCH, WIDTH))
    step = np.eye(WIDTH) - rate * curvature

    x, c, a = (torch.tensor(array, requires_grad=True) for array in (start, centre, curvature))
    last = final(
        lambda t: 0.5 * torch.einsum("bi,ij,bj->b", t["x"] - c, a, t["x"] - c),
        {"x": x},
        sgd,
        constant(x=rate),
        STEPS,
        order=order,
        last_k=last_k,
    )
    got_x, got_c = gradients((last.tensors["x"] * torch.tensor(outer)).sum(), x, c)

    power = np.linalg.matrix_power(step, STEPS)
    np.testing.assert_allclose(last.tensors["x"].detach(), centre + (start - centre) @ power, rtol=1e-12)
    # Differentiated steps multiply by P; of the others, whose gradient is constant, the identity remains.
    differentiated = 0 if order == "first" else STEPS if last_k is None else min(last_k, STEPS)
    through = outer @ np.linalg.matrix_power(step, differentiated)
    np.testing.assert_allclose(got_x, through, rtol=1e-10)
    np.testing.assert_allclose(got_c, outer - through, rtol=1e-10, atol=1e-12)


# --- A nonlinear problem with two tensors and a learned rate, written again in NumPy ----------------------
#
# u = W x + z;  L_b = sum(log cosh(u - t)) + 0.1 sum(z^2)
# J = sum(sin(x) + x z + (W x)^2) + 0.5 sum(last inner losses)

TARGET = np.linspace(-1, 1, BATCH * WIDTH).reshape(BATCH, WIDTH)
POINT = {
    name: np.random.default_rng(seed).normal(size=shape) * 0.7
    for seed, (name, shape) in enumerate(
        {"w": (WIDTH, WIDTH), "x": (BATCH, WIDTH), "z": (BATCH, WIDTH), "log_rate": (WIDTH,)}.items()
    )
}
Frozen = list[dict[str, np.ndarray]]


def inner_gradient(w: np.ndarray, x: np.ndarray, z: np.ndarray) -> dict[str, np.ndarray]:
    slope = np.tanh(x @ w.T + z - TARGET)
    return {"x": slope @ w, "z": slope + 0.2 * z}


def by_hand(
    at: dict[str, np.ndarray],
    optimizer: str,
    clip_value: float | None,
    clip_norm: float | None,
    frozen: Frozen | None = None,
    live: int = STEPS,
) -> tuple[float, dict[str, np.ndarray], Frozen]:
    """Return J, the final tensors, and the inner gradients; `frozen` replaces all but the last `live`."""
    w, rates = at["w"], {"x": np.exp(at["log_rate"]), "z": 0.2}
    now, seen = {"x": at["x"], "z": at["z"]}, []
    mean = square = dict.fromkeys(now, 0.0)
    for step in range(STEPS):
        inner = np.log(np.cosh(now["x"] @ w.T + now["z"] - TARGET)).sum() + 0.1 * (now["z"] ** 2).sum()
        gradient = inner_gradient(w, **now) if frozen is None or step >= STEPS - live else frozen[step]
        seen.append(gradient)
        if clip_value is not None:
            gradient = {name: np.clip(g, -clip_value, clip_value) for name, g in gradient.items()}
        if clip_norm is not None:
            norms = {name: np.sqrt((g**2).sum(1, keepdims=True)) for name, g in gradient.items()}
            gradient = {
                name: np.where(norms[name] > clip_norm, g * clip_norm / (norms[name] + 1e-6), g)
                for name, g in gradient.items()
            }
        if optimizer == "adam":
            mean = {name: 0.9 * mean[name] + 0.1 * g for name, g in gradient.items()}
            square = {name: 0.999 * square[name] + 0.001 * g**2 for name, g in gradient.items()}
            first, second = 1 - 0.9 ** (step + 1), 1 - 0.999 ** (step + 1)
            gradient = {name: mean[name] / first / np.sqrt(square[name] / second + 1e-16) for name in mean}
        now = {name: now[name] - rates[name] * gradient[name] for name in now}
    x, z = now["x"], now["z"]
    return (np.sin(x) + x * z + (x @ w.T) ** 2).sum() + 0.5 * inner, now, seen


def by_descend(
    at: dict[str, np.ndarray],
    optimizer: str,
    clip_value: float | None,
    clip_norm: float | None,
    order: str,
    last_k: int | None = None,
    strategy: str = "unroll",
) -> tuple[Tensor, Step, dict[str, Tensor]]:
    """Return J, the last step and the leaves."""
    leaves = {name: torch.tensor(array, requires_grad=True) for name, array in at.items()}
    w = leaves["w"]

    def loss(t: dict[str, Tensor]) -> Tensor:
        u = t["x"] @ w.T + t["z"] - torch.tensor(TARGET)
        return u.cosh().log().sum(1) + 0.1 * (t["z"] ** 2).sum(1)

    last = final(
        loss,
        {"x": leaves["x"], "z": leaves["z"]},
        OPTIMIZERS[optimizer],
        constant(x=leaves["log_rate"].exp(), z=0.2),
        STEPS,
        order=order,
        last_k=last_k,
        strategy=strategy,
        clip_value=clip_value,
        clip_norm=clip_norm,
    )
    x, z = last.tensors["x"], last.tensors["z"]
    return (x.sin() + x * z + (x @ w.T) ** 2).sum() + 0.5 * last.losses[-1].sum(), last, leaves


def central(function: Callable[[np.ndarray], float], point: np.ndarray, h: float = 1e-6) -> np.ndarray:
    """Central differences of a function of an array."""
    slope = np.zeros_like(point)
    for index in np.ndindex(point.shape):
        shift = np.zeros_like(point)
        shift[index] = h
        slope[index] = (function(point + shift) - function(point - shift)) / (2 * h)
    return slope


CLIPS = [(None, None), (0.5, None), (None, 0.8), (0.6, 0.9)]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("clips", CLIPS, ids=str)
@pytest.mark.parametrize(("order", "last_k"), [("second", None), ("second", 2), ("first", None)])
@pytest.mark.parametrize("strategy", AUTO)
def test_meta_gradient_slopes(optimizer: str, clips: tuple, order: str, last_k: int | None, strategy: str) -> None:
    """Gradients of J are the slopes of the NumPy descent in which constants of the order are frozen."""
    live = 0 if order == "first" else STEPS if last_k is None else last_k
    value, last, leaves = by_descend(POINT, optimizer, *clips, order, last_k, strategy)
    wanted, final_tensors, frozen = by_hand(POINT, optimizer, *clips)
    assert value.item() == pytest.approx(wanted, rel=1e-12)
    for name, array in final_tensors.items():
        np.testing.assert_allclose(last.tensors[name].detach(), array, rtol=1e-10)
    for name, grad in zip(leaves, gradients(value, *leaves.values()), strict=True):
        outer = lambda v, n=name: by_hand(POINT | {n: v}, optimizer, *clips, frozen, live)[0]  # noqa: E731
        slope = central(outer, POINT[name])
        np.testing.assert_allclose(grad, slope, rtol=1e-5, atol=1e-6 * np.abs(slope).max(), err_msg=name)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("strategy", AUTO)
def test_meta_gradient_order_none(optimizer: str, strategy: str) -> None:
    """Everything that was written is a constant: W acts only in the outer loss and in the last inner loss."""
    value, last, leaves = by_descend(POINT, optimizer, None, None, "none", strategy=strategy)
    _, now, frozen = by_hand(POINT, optimizer, None, None)
    np.testing.assert_allclose(last.tensors["x"], now["x"], rtol=1e-10)
    grads = dict(zip(leaves, gradients(value, *leaves.values()), strict=True))
    for name in ("x", "z", "log_rate"):
        assert not grads[name].any(), name
    slope = central(lambda w: by_hand(POINT | {"w": w}, optimizer, None, None, frozen, live=0)[0], POINT["w"])
    np.testing.assert_allclose(grads["w"], slope, rtol=1e-6, atol=1e-6)


def test_computed_tensors_go_through_given() -> None:
    """A tensor that was computed outside gets its gradient as an argument; as a closure it fails aloud."""
    grads = []
    for strategy in AUTO:
        w = torch.tensor(POINT["w"], requires_grad=True)
        options: dict[str, Any] = {"given": [w.exp()], "strategy": strategy}
        loss = lambda t, e: ((t["x"] @ e.T) ** 2).sum(1)  # noqa: E731
        last = final(loss, {"x": torch.tensor(POINT["x"])}, sgd, constant(x=0.01), 3, **options)
        grads.append(gradients(last.tensors["x"].sin().sum(), w)[0])
    np.testing.assert_allclose(grads[0], grads[1], rtol=1e-12)

    w = torch.tensor(POINT["w"], requires_grad=True)
    computed = w.exp()
    closure = lambda t: ((t["x"] @ computed.T) ** 2).sum(1)  # noqa: E731
    last = final(closure, {"x": torch.tensor(POINT["x"])}, sgd, constant(x=0.01), 3, strategy="recompute")
    with pytest.raises(RuntimeError, match="second time"):
        last.tensors["x"].sum().backward()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("order", ORDERS)
def test_without_gradients_the_result_is_the_same(optimizer: str, order: str) -> None:
    _, trained, _ = by_descend(POINT, optimizer, 0.6, 0.9, order)
    with torch.no_grad():
        _, free, _ = by_descend(POINT, optimizer, 0.6, 0.9, order)
    assert not any(tensor.requires_grad for tensor in [*free.losses, *free.tensors.values()])
    for name, tensor in trained.tensors.items():
        torch.testing.assert_close(free.tensors[name], tensor.detach(), rtol=1e-13, atol=0)


# --- Steps, samples, stopping -----------------------------------------------------------------------------


def bowl(scale: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
    """Each sample a bowl of its own steepness."""
    return lambda t: (scale * (t["x"] ** 2).sum(1)) + 0.1 * (t["x"] ** 4).sum(1)


def test_yields_the_start_and_every_step() -> None:
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([0.5, 1.5], dtype=torch.float64)
    states = list(descend(bowl(scale), {"x": x}, sgd, constant(x=0.1), 3))
    assert [state.taken.tolist() for state in states] == [[0, 0], [1, 1], [2, 2], [3, 3]]
    assert [len(state.losses) for state in states] == [0, 1, 2, 3]
    torch.testing.assert_close(states[0].tensors["x"], x)
    for k, state in enumerate(states[:-1]):
        torch.testing.assert_close(states[-1].losses[k], bowl(scale)(state.tensors))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("order", ORDERS)
def test_samples_are_independent(optimizer: str, order: str) -> None:
    """A sample's result, and its gradient to its own start, are what it gets alone; neighbours get none."""
    start = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scale = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)

    def run(rows: list[int]) -> tuple[Tensor, Tensor]:
        x, loss = start[rows].requires_grad_(), bowl(scale[rows])
        last = final(loss, {"x": x}, OPTIMIZERS[optimizer], constant(x=0.1), 3, order=order, clip_norm=1.0)
        return x, last.tensors["x"]

    x, together = run([0, 1, 2])
    for row in range(3):
        alone_x, alone = run([row])
        torch.testing.assert_close(together[row], alone[0], rtol=1e-13, atol=0)
        if order != "none":
            (grad,) = torch.autograd.grad(together[row].sum(), x, retain_graph=True)
            (alone_grad,) = torch.autograd.grad(alone.sum(), alone_x)
            torch.testing.assert_close(grad[row], alone_grad[0], rtol=1e-12, atol=0)
            assert not grad[[other for other in range(3) if other != row]].any()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("training", [True, False])
def test_until_stops_each_sample_by_its_own_loss(optimizer: str, training: bool) -> None:
    start = torch.full((4, 3), 0.8, dtype=torch.float64)
    scale = torch.tensor([0.0, 0.4, 0.9, 3.0], dtype=torch.float64)
    start[0] = 0.01
    until, most, update, rates = 0.3, 7, OPTIMIZERS[optimizer], constant(x=0.1)
    x = start.clone().requires_grad_()
    with torch.set_grad_enabled(training):
        last = final(bowl(scale), {"x": x}, update, rates, most, until=until)
    expected = []
    for row in range(4):
        own = bowl(scale[row : row + 1])
        path = [state.tensors["x"] for state in descend(own, {"x": x[row : row + 1]}, update, rates, most)]
        steps = next((k for k, point in enumerate(path) if own({"x": point}) <= until), most)
        expected.append(steps)
        torch.testing.assert_close(last.tensors["x"][row], path[steps][0])
        if training:
            (got,) = torch.autograd.grad(last.tensors["x"][row].sum(), x, retain_graph=True)
            (wanted,) = torch.autograd.grad(path[steps].sum(), x, retain_graph=True)
            torch.testing.assert_close(got, wanted)
    assert last.taken.tolist() == expected
    assert len(set(expected)) > 2, "the test should see different numbers of steps"
    assert len(last.losses) == max(expected)


def test_until_that_all_meet_at_once_takes_no_step() -> None:
    x = torch.ones(2, 3)
    (only,) = descend(bowl(torch.ones(2)), {"x": x}, sgd, constant(x=0.1), 5, until=100.0)
    assert only.taken.tolist() == [0, 0]
    assert only.losses == []
    torch.testing.assert_close(only.tensors["x"], x)


# --- Clips and optimisers by hand -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "norm", "wanted"),
    [
        (None, None, [[3.0, -4.0], [0.3, 0.4]]),
        (2.0, None, [[2.0, -2.0], [0.3, 0.4]]),
        (None, 1.0, [[3 / 5.000001, -4 / 5.000001], [0.3, 0.4]]),
        # By value first: (3, -4) -> (3, -3), whose norm sqrt(18) is then clipped to 2.
        (3.0, 2.0, [[6 / (math.sqrt(18) + 1e-6), -6 / (math.sqrt(18) + 1e-6)], [0.3, 0.4]]),
        (None, 0.25, [[0.75 / 5.000001, -1 / 5.000001], [0.075 / 0.500001, 0.1 / 0.500001]]),
    ],
)
@pytest.mark.parametrize("shape", [(2, 2), (2, 1, 2), (2, 2, 1)])
def test_clip(value: float | None, norm: float | None, wanted: list, shape: tuple) -> None:
    grad = torch.tensor([[3.0, -4.0], [0.3, 0.4]], dtype=torch.float64).reshape(shape)
    wanted = torch.tensor(wanted, dtype=torch.float64).reshape(shape)
    torch.testing.assert_close(clip(grad, value, norm), wanted, rtol=1e-14, atol=0)


def test_adam_agrees_with_pytorch() -> None:
    """Where gradients are far above epsilon, sqrt(v + eps^2) is sqrt(v) + eps to nine digits."""
    start = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 3
    scale = torch.tensor([0.5, 2.0], dtype=torch.float64)
    last = final(bowl(scale), {"x": start}, OPTIMIZERS["adam"], constant(x=0.05), 6)
    x = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.05)
    for _ in range(6):
        optimizer.zero_grad()
        bowl(scale)({"x": x}).sum().backward()
        optimizer.step()
    torch.testing.assert_close(last.tensors["x"].detach(), x.detach(), rtol=1e-8, atol=0)


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.5}, {"clip_value": 0.1, "clip_norm": 0.5}], ids=str)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_second_order_where_gradients_are_exactly_zero(optimizer: str, options: dict) -> None:
    """The second half of the tensor, and the whole second sample, never get a gradient."""
    w = np.array([0.7, -1.2])
    start = np.random.default_rng(3).normal(size=(2, 4))

    def outer(w: Tensor, x: Tensor) -> Tensor:
        loss = lambda t: torch.stack([torch.cosh(t["x"][0, :2] * w).sum(), 0 * t["x"][1].sum()])  # noqa: E731
        last = final(loss, {"x": x}, OPTIMIZERS[optimizer], constant(x=0.1), 3, **options)
        return (last.tensors["x"] ** 2).sum()

    leaves = torch.tensor(w, requires_grad=True), torch.tensor(start, requires_grad=True)
    got_w, got_x = gradients(outer(*leaves), *leaves)
    with torch.no_grad():
        slope_w = central(lambda w: float(outer(torch.tensor(w), torch.tensor(start))), w)
        slope_x = central(lambda x: float(outer(torch.tensor(w), torch.tensor(x))), start)
    np.testing.assert_allclose(got_w, slope_w, rtol=1e-6)
    np.testing.assert_allclose(got_x, slope_x, rtol=1e-6)


def test_adam_at_a_gradient_that_is_zero_but_moves() -> None:
    """x stands in the minimum of (x - c)^2: the slope there is -lr / eps, huge but finite."""
    x = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    last = final(lambda t: (t["x"] ** 2).sum(1) / 2, {"x": x}, OPTIMIZERS["adam"], constant(x=0.1), 1)
    (grad,) = torch.autograd.grad(last.tensors["x"].sum(), x)
    assert grad.item() == pytest.approx(1 - 0.1 / 1e-8)
    last = final(lambda t: (t["x"] ** 2).sum(1) / 2, {"x": x}, OPTIMIZERS["adam"], constant(x=0.1), 3)
    assert torch.autograd.grad(last.tensors["x"].sum(), x)[0].isfinite()


# --- The objective ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_token_losses(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(4)).to(dtype)
    ids = torch.tensor([[4, 0, 2], [1, 3, 0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    head = nn.Linear(5, 5, bias=False, dtype=dtype)
    nn.init.eye_(head.weight)
    losses = token_losses(logits, head, ids, mask)
    for b, t in product(range(2), range(3)):
        row = logits[b, t].double().tolist()
        wanted = math.log(sum(map(math.exp, row))) - row[ids[b, t]] if mask[b, t] else 0.0
        assert losses[b, t].item() == pytest.approx(wanted, rel=1e-6)
    means = [losses[0].sum().item() / 3, losses[1, :2].sum().item() / 2]
    assert sample_losses(losses, mask).tolist() == pytest.approx(means)
