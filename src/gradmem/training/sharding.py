"""Training that shares out weights, gradients and states of optimizers over processes, by Accelerate and FSDP2.

All weights are one unit of FSDP2: they are gathered before a step and their gradients are reduced after it. Within the
step they are whole, so WRITE may differentiate as often as it likes. Units of a block each would be freed by the first
of its backward passes.
"""

from __future__ import annotations

import copy
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import GradmemError
from ..methods.base import Method
from .step import MetaStep

Optimizers = list[torch.optim.Optimizer]


def new_accelerator(*, cpu: bool) -> Accelerator:
    """Build the accelerator that the environment asks for, as `accelerate launch` sets it.

    Raises
    ------
    GradmemError
        If it asks for what training here cannot do.
    """
    if _asked("ACCELERATE_USE_DEEPSPEED"):
        raise GradmemError(
            "DeepSpeed takes over backward, clipping and the step of a single optimizer, and training here has two and "
            "differentiates inside of a step: take FSDP2 instead, which shards the same tensors"
        )
    if _asked("ACCELERATE_USE_FSDP"):
        _check_fsdp()
    accelerator = Accelerator(cpu=cpu, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    if accelerator.mixed_precision != "no":
        raise GradmemError(
            f"the recipe says in which precision to train: leave out `mixed_precision: {accelerator.mixed_precision}` "
            "of Accelerate and give --precision"
        )
    if _asked("ACCELERATE_USE_FSDP") and not accelerator.is_fsdp2:
        raise GradmemError(
            "Accelerate shards over several accelerators only, and here is none for each process: leave its "
            "configuration out, and give --processes for data parallelism"
        )
    return accelerator


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "").lower() == "true"


def _check_fsdp() -> None:
    version, wrap = os.environ.get("FSDP_VERSION", "1"), os.environ.get("FSDP_AUTO_WRAP_POLICY", "NO_WRAP")
    if version != "2":
        raise GradmemError(f"FSDP {version} cannot be differentiated twice: set `fsdp_version: 2`")
    if wrap != "NO_WRAP":
        raise GradmemError(
            f"`fsdp_auto_wrap_policy: {wrap}` frees the weights of a block after the first backward pass of WRITE, and "
            "the meta-gradient needs them again: set `fsdp_auto_wrap_policy: NO_WRAP`, which shards all of them as one "
            "unit"
        )


def trained_copy(accelerator: Accelerator, method: Method) -> Method:
    """The method whose weights are trained: a copy if they will be sharded; then `method` stays whole, on the CPU."""
    if not accelerator.is_fsdp2:
        return method
    trained = copy.deepcopy(method)
    method.to("cpu")
    return trained


def prepare(accelerator: Accelerator, step: MetaStep, optimizers: Optimizers) -> tuple[nn.Module, Optimizers]:
    """Let Accelerate wrap a step for data parallelism, or shard it together with its optimizers and their states."""
    if not accelerator.is_fsdp2:
        return accelerator.prepare(step), optimizers
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    for optimizer in optimizers:
        optimizer.state = defaultdict(dict)  # Accelerate changes the parameters, which are its keys
    sharded, *prepared = accelerator.prepare(step, *optimizers)
    for optimizer, state in zip(prepared, states, strict=True):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        shares = {
            number: {name: _share(value, parameters[number]) for name, value in entries.items()}
            for number, entries in state.items()
        }
        optimizer.load_state_dict({**optimizer.state_dict(), "state": shares})
    return sharded, prepared


def _share(value: Any, parameter: Tensor) -> Any:
    """This process's part of a state that is as large as its parameter."""
    if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape:
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


def whole(tensor: Tensor) -> Tensor:
    """A tensor as a whole; if it is sharded, all processes must ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def gather(trained: Method, method: Method) -> None:
    """Copy the trained weights to the method that stays whole; all processes must call it together."""
    if trained is not method:
        for mine, theirs in zip(method.parameters(), trained.parameters(), strict=True):
            mine.copy_(whole(theirs))


@contextmanager
def on_device(accelerator: Accelerator, method: Method) -> Iterator[None]:
    """Move the method that stays whole to the device while something is measured with it."""
    if accelerator.is_fsdp2:
        method.to(accelerator.device)
    try:
        yield
    finally:
        if accelerator.is_fsdp2:
            method.to("cpu")
