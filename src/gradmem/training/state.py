"""The state of a run, saved so that a run can be resumed, and warm starts from other weights."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from ..errors import GradmemError
from ..files import atomic_directory
from ..inner import Strategy
from ..methods.base.inner_loop import InnerLoop
from .recipe import Precision
from .sharding import whole

PATTERN = re.compile(r"step-(\d{8})")


@dataclass
class RunState:
    """What a run needs to be resumed, beside its weights and the states of its optimizers."""

    step: int = 0
    """Optimizer steps taken."""
    stage: int = 0
    """Index of the current stage."""
    stage_step: int = 0
    """Optimizer steps taken in the current stage."""
    samples: int = 0
    """Contexts trained on."""
    seconds: float = 0.0
    """Time spent on training steps and on measuring how to run them."""
    recent: list[float] = field(default_factory=list)
    """Exact match of the last steps of the current stage."""
    decay_from: int | None = None
    """Step of the current stage at which the decay of the learning rates began."""
    strategy: Strategy = "recompute"
    """How the current stage computes the meta-gradient."""
    micro_batch_size: int = 0
    """Contexts of one pass in the current stage; 0 while not chosen."""
    precision: Precision = "auto"
    """Precision of the current stage; auto while not chosen."""
    device: str = ""
    """Kind of device for which strategy, micro-batch size and precision were chosen."""
    ended: int = -1
    """Step at which a stage last ended, done or out of time, with its checkpoint and validation; -1 before."""

    @classmethod
    def of(cls, path: Path, progress: dict[str, Any]) -> RunState:
        """Build it from the progress that `load_state` read from `path`.

        Raises
        ------
        GradmemError
            If the fields are those of another version.
        """
        if set(progress) != {field.name for field in fields(cls)}:
            raise GradmemError(
                f"cannot resume from {path}: another version of gradmem saved it; start again with another --output"
            )
        return cls(**progress)

    def next_stage(self) -> None:
        """Go to the beginning of the next stage."""
        self.stage, self.stage_step, self.recent = self.stage + 1, 0, []
        self.decay_from = None
        self.micro_batch_size, self.precision = 0, "auto"


def save_state(
    directory: Path,
    step: int,
    module: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    progress: dict[str, Any],
    *,
    write: bool = True,
) -> None:
    """Save a state, whole or not at all, and delete older ones and what an interrupted save left behind.

    All processes of a run must call it together, since the states of optimizers may be sharded; one of them writes.
    """
    tensors, settings = _flatten(optimizers)
    if not write:
        return
    with atomic_directory(directory / f"step-{step:08d}") as state:
        save_model(module, str(state / "weights.safetensors"))
        save_file(tensors, state / "optimizers.safetensors")
        (state / "progress.json").write_text(json.dumps({**progress, "optimizers": settings}))
    for old in [*states(directory)[:-1], *directory.glob(".*.tmp")]:
        shutil.rmtree(old, ignore_errors=True)


def states(directory: Path) -> list[Path]:
    """Directories of the complete states, oldest first."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if PATTERN.fullmatch(path.name))


def load_state(path: Path, module: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """Load weights and optimizers of a state in place, and return its progress.

    Raises
    ------
    GradmemError
        If the state does not fit the recipe or cannot be read.
    """
    try:
        load_model(module, str(path / "weights.safetensors"))
        progress = json.loads((path / "progress.json").read_text())
        _restore(optimizers, load_file(path / "optimizers.safetensors"), progress.pop("optimizers"))
    except (OSError, RuntimeError, KeyError, ValueError, SafetensorError) as error:
        raise GradmemError(f"cannot resume from {path}: {error}; start again with another --output") from error
    return progress


def take_weights(module: nn.Module, other: nn.Module) -> list[str]:
    """Copy the weights of another module that have the same name and shape.

    Rates and momentum for each write step fit any number of steps: the first ones are copied, and those that the other
    was not trained for begin as it takes them, falling by its `extra_step_decay`.
    Only one of the two modules may have LoRA adapters: the weights of adapted layers are copied too, and adapters that
    only the other module has are ignored.

    Returns
    -------
    list of str
        Names of the weights that were not copied.
    """
    theirs = {_unadapted(name): weight for name, weight in other.state_dict().items()}
    if isinstance(module, InnerLoop) and isinstance(other, InnerLoop) and module.momentum is not None:
        theirs |= other.learned_of_steps(module.write_steps)
    kept = []
    with torch.no_grad():
        for name, weight in module.state_dict().items():
            start = theirs.get(_unadapted(name))
            if start is not None and start.shape == weight.shape:
                weight.copy_(start)
            else:
                kept.append(name)
    return kept


def _unadapted(name: str) -> str:
    """The name of a weight without LoRA adapters; peft inserts `base_layer` into it."""
    return name.replace(".base_layer.", ".")


def _flatten(optimizers: list[torch.optim.Optimizer]) -> tuple[dict[str, Tensor], list[Any]]:
    """Tensors of the optimizers, named `optimizer.parameter.entry`, and their settings as plain data."""
    tensors, settings = {}, []
    for index, optimizer in enumerate(optimizers):
        state = optimizer.state_dict()
        for parameter, entries in state["state"].items():
            for name, value in entries.items():
                tensors[f"{index}.{parameter}.{name}"] = whole(torch.as_tensor(value)).contiguous()
        settings.append(state["param_groups"])
    return tensors, settings


def _restore(optimizers: list[torch.optim.Optimizer], tensors: dict[str, Tensor], settings: list[Any]) -> None:
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    for key, tensor in tensors.items():
        index, parameter, name = key.split(".")
        states[int(index)].setdefault(int(parameter), {})[name] = tensor
    for optimizer, state, groups in zip(optimizers, states, settings, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": groups})
