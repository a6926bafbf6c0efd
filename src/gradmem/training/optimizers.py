"""Optimizers for meta-training: Muon for the matrices in the blocks, AdamW for everything else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.base import Method
from .recipe import Recipe


class Muon(torch.optim.Muon):
    """PyTorch's Muon, but all matrices of one shape are orthogonalized together: far fewer kernel launches on a GPU.

    Options, states and updates are those of `torch.optim.Muon`, up to the rounding of bfloat16.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            shapes: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[parameter.shape, parameter.dtype, parameter.device].append(parameter)
            for alike in shapes.values():
                self._step_together(group, alike)
        return loss

    def _step_together(self, group: dict[str, Any], alike: list[Tensor]) -> None:
        """Take a step for parameters of one shape."""
        rate, momentum, (rows, columns) = float(group["lr"]), group["momentum"], alike[0].shape
        grads = [parameter.grad for parameter in alike if parameter.grad is not None]
        states = [self.state[parameter] for parameter in alike]
        for state, parameter in zip(states, alike, strict=True):
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [state["momentum_buffer"] for state in states]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        updates = torch._foreach_lerp(grads, buffers, momentum) if group["nesterov"] else buffers
        directions = orthogonalized(
            torch.stack(list(updates)), group["ns_coefficients"], group["ns_steps"], group["eps"]
        )
        scale = {
            None: max(1, rows / columns) ** 0.5,
            "original": max(1, rows / columns) ** 0.5,
            "match_rms_adamw": 0.2 * max(rows, columns) ** 0.5,
        }[group["adjust_lr_fn"]]
        torch._foreach_mul_(alike, 1 - rate * group["weight_decay"])
        torch._foreach_add_(alike, list(directions.to(alike[0].dtype).unbind()), alpha=-rate * scale)


def orthogonalized(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Bring the singular values of matrices near 1, by Newton-Schulz iterations in bfloat16.

    Parameters
    ----------
    matrices : Tensor, shape (count, rows, columns)
    coefficients : tuple of float
        Coefficients of x, x^3 and x^5 in each iteration.
    steps : int
        Number of iterations.
    eps : float
        Smallest norm to divide by.

    Returns
    -------
    Tensor, bfloat16, shape (count, rows, columns)
    """
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def build_optimizers(method: Method, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Build the optimizers of a recipe: Muon for the matrices in the blocks if it says so, AdamW for the rest.

    The list is empty if nothing is trained.
    """
    matrices = [p for p in _block_matrices(method) if p.requires_grad] if recipe.optimizer == "muon" else []
    inner = [] if recipe.inner_adamw_lr is None else [p for p in method.inner_parameters() if p.requires_grad]
    chosen = {id(p) for p in [*matrices, *inner]}
    rest = [p for p in method.parameters() if p.requires_grad and id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        # On a CPU there are no launches to save, and one matrix at a time is faster.
        muon = torch.optim.Muon if matrices[0].device.type == "cpu" else Muon
        optimizers.append(muon(matrices, lr=recipe.muon_lr, momentum=0.95, weight_decay=0.0))
    if rest or inner:
        beta1, beta2 = recipe.betas
        groups: list[dict[str, Any]] = [
            {"params": rest},
            {"params": inner, "lr": recipe.inner_adamw_lr},
        ]
        optimizers.append(
            torch.optim.AdamW(
                [group for group in groups if group["params"]],
                lr=recipe.adamw_lr,
                betas=(beta1, beta2),
                weight_decay=0.0,
                fused=method.backbone.model.device.type == "cuda" or None,
            )
        )
    return optimizers


def _block_matrices(method: Method) -> list[nn.Parameter]:
    """2-d weights of the backbone without embeddings, output layer and adapters.

    Other 2-d parameters, such as the decay rates of Mamba, are not matrices that multiply a vector.
    """
    body = method.backbone.body
    outside = {id(method.backbone.head.weight)}
    outside |= {id(m.weight) for m in body.modules() if isinstance(m, nn.Embedding)}
    return [
        p
        for name, p in body.named_parameters()
        if name.endswith("weight") and p.dim() == 2 and id(p) not in outside and "lora_" not in name
    ]
