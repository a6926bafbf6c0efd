"""What a training run is, as typed data: one source for YAML files, the command line and Python."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from ..errors import GradmemError, unknown
from ..plugins import directories
from ..visible import visible

Precision = Literal["auto", "fp32", "tf32", "bf16"]


@dataclass
class Stage:
    """One stage of the curriculum."""

    max_steps: int
    """Optimiser steps after which the stage ends (its decay included)."""
    write_steps: list[int] = field(default_factory=list)
    """Numbers of write steps K, of which one is drawn anew for every optimiser step; by default the method's
    own number."""
    tasks: list[dict[str, Any]] = field(default_factory=lambda: [{}])
    """Task options that differ from the recipe's, as `{pairs: 4}`; one entry is drawn anew for every step."""
    batch_size: int = 32
    """Contexts in a batch, over all processes."""
    lr: float = 1.0
    """Factor on all learning rates."""
    until: float | None = None
    """Exact match on fresh training samples, mean over the last 10 steps, that ends the stage."""
    warmup: int = 30
    """Steps over which the learning rates rise from zero."""
    patience: int = 0
    """Halve the learning rates when exact match has not risen for this many steps; 0: never."""
    decay: int = 0
    """Steps at the end over which the learning rates fall linearly to zero."""
    inner_loss_weight: float | None = None
    """Weight of the write loss in the outer loss; by default the recipe's."""

    def __post_init__(self) -> None:
        if self.max_steps < 1 or self.batch_size < 1 or min(self.write_steps, default=0) < 0:
            raise GradmemError("a stage needs max_steps >= 1, batch_size >= 1 and write_steps like [3, 4, 5]")
        if not self.tasks:
            raise GradmemError("a stage's `tasks` is a list like [{pairs: 4}], or is left out")
        if self.until is not None and not 0 < self.until <= 1:
            raise GradmemError(f"a stage's `until` is an exact match from 0 to 1, not {self.until}")
        if self.decay > self.max_steps:
            raise GradmemError(f"a stage's decay ({self.decay}) must not be longer than max_steps ({self.max_steps})")


@dataclass
class Recipe:
    """A training run from beginning to end."""

    task: dict[str, Any]
    """Task `name` and its options."""
    backbone: dict[str, Any]
    """`pretrained: NAME`, or `model_type` and fields of its Hugging Face config for random weights."""
    method: dict[str, Any]
    """Method `name` and its options."""
    stages: list[Stage]
    """The curriculum, one stage after the other."""
    init_from: str | None = None
    """Checkpoint to start from; weights of equal name and shape are taken over."""
    seed: int = 0
    """Seed of weights, samples and draws of K."""
    precision: Precision = "auto"
    """Precision of matrix products; weights, sums and softmax stay float32. auto: tf32 on CUDA; on a CPU bf16 where it
    is faster and its meta-gradient agrees with that of fp32 to 5 %, else fp32. Chosen at each stage."""
    device: str = "auto"
    """cpu, the name of an accelerator (cuda, mps, xpu), or auto: the accelerator where there is one."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """Optimiser of the blocks' matrices; everything else takes AdamW."""
    muon_lr: float = 0.01
    """Learning rate of Muon."""
    adamw_lr: float = 1e-3
    """Learning rate of AdamW."""
    inner_adamw_lr: float | None = None
    """Learning rate of AdamW for learned inner learning rates and momentum; by default adamw_lr."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    """Betas of AdamW."""
    weight_decay: float = 0.0
    """Weight decay of both optimisers."""
    clip_norm: float = 1.0
    """Largest norm of the meta-gradient."""
    inner_loss_weight: float = 0.0
    """Weight of the method's write loss in the outer loss, where a stage has none of its own; GradMem's is that of the
    last write step. It helps to bind the first pairs; later it costs answers, as keys are stored for it too."""
    strategy: Literal["auto", "unroll", "recompute", "compile"] = "auto"
    """Keep the graph of every write step, or of one at a time; auto: the fastest of the two that fits, measured at each
    stage. compile: every write step as compiled code, in 0.6 of the time on a CPU, after a minute or two for every
    length of context; for long stages of contexts of one length, and needs a C++ compiler. On CUDA, auto tries it too
    where a stage takes more than twenty minutes."""
    micro_batch: int = 0
    """Contexts of one forward and backward pass, of which the gradients add up; 0: measured at each stage."""
    max_minutes: float | None = None
    """Minutes of training steps after which the run ends where it is: by a clock on the wall, over all resumed parts,
    validation not counted. The learning rates fall to zero in the last part of it, `cooldown`."""
    cooldown: float = 0.15
    """Part of `max_minutes` at its end in which the learning rates fall to zero: a constant rate hides what was
    learned."""
    save_every: int = 50
    """Optimiser steps between resumable states."""
    valid_samples: int = 128
    """Validation contexts at the end of every stage."""

    def __post_init__(self) -> None:
        if self.max_minutes is not None and self.max_minutes <= 0:
            raise GradmemError(f"max_minutes is a time above 0, not {self.max_minutes}")
        if not 0 < self.cooldown <= 1:
            raise GradmemError(f"cooldown is a part of max_minutes, above 0 and at most 1, not {self.cooldown}")
        if not self.stages:
            raise GradmemError("a recipe needs at least one stage")
        for part in ("task", "method"):
            if "name" not in getattr(self, part):
                raise GradmemError(f"a recipe's {part} needs a name")
        if not all(stage.write_steps for stage in self.stages):
            from ..model.build import default_write_steps

            own = [default_write_steps(self.method)]
            self.stages = [replace(stage, write_steps=stage.write_steps or own) for stage in self.stages]

    def weight_of(self, stage: Stage) -> float:
        """Weight of the write loss in a stage's outer loss."""
        return self.inner_loss_weight if stage.inner_loss_weight is None else stage.inner_loss_weight


IDENTITY = {"name", "model_type", "pretrained"}
"""What says which task, method or backbone it is, beside its options."""


def recipe_groups() -> dict[str, list[str]]:
    """Names of the recipes by group: the folders in the package, then each installed package that brings some."""
    return {group: sorted(files) for group, files in _recipes().items()}


def recipe_names() -> list[str]:
    """Names of the recipes in the package and in installed plug-ins."""
    return sorted(_files())


def _recipes() -> dict[str, dict[str, Path]]:
    """Files of the recipes by group and name; a plug-in's recipe whose name is taken is ignored, with a warning."""
    groups: dict[str, dict[str, Path]] = {}
    for file in sorted(Path(str(resources.files("gradmem"))).glob("recipes/*/*.yaml")):
        groups.setdefault(file.parent.name, {})[file.stem] = file
    for package, directory in directories("gradmem.recipes"):
        taken = {name for files in groups.values() for name in files}
        found = {file.stem: file for file in sorted(directory.glob("*.yaml"))}
        for name in sorted(found.keys() & taken):
            warnings.warn(f"the recipe '{name}' of the package {package} is ignored: the name is taken", stacklevel=2)
        groups.setdefault(package, {}).update({name: file for name, file in found.items() if name not in taken})
    return groups


def _files() -> dict[str, Path]:
    """Files of all recipes by name."""
    return {name: file for files in _recipes().values() for name, file in files.items()}


def recipe_path(name: str) -> Path:
    """Find a recipe by name or by path.

    Raises
    ------
    GradmemError
        When there is neither.
    """
    if (named := _files().get(name)) is not None:
        return named
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    raise unknown("recipe", name, recipe_names())


def recipe_values(name: str, extending: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read the fields of a recipe, a packaged one by name or any by path, as plain data.

    A recipe that says `extends: OTHER` has the fields of the other where it has none of its own; the other is a
    packaged one, or a path from the directory of the recipe. A task, backbone or method that does not say which it is
    (`name`, `model_type`, `pretrained`) is the other's with some options changed.

    Parameters
    ----------
    name : str
    extending : tuple of Path
        Recipes that extend this one.

    Raises
    ------
    GradmemError
        When the file cannot be read, has a field that no recipe has, or extends itself.
    """
    path = recipe_path(name)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise GradmemError(f"cannot read the recipe {path}: {error}") from error
    if any(text != visible(text) for text in _texts(values)):
        raise GradmemError(f"cannot read the recipe {path}: there are control characters in its text")
    if path in extending:
        raise GradmemError(f"{path} extends itself")
    if isinstance(values, dict) and "extends" in values:
        other = str(values.pop("extends"))
        other = other if other in recipe_names() else str(path.parent / other)
        values = _extended(recipe_values(other, (*extending, path)), values)
    known = {field.name for field in fields(Recipe)}
    if not isinstance(values, dict) or not set(values) <= known:
        extra = sorted(set(values) - known) if isinstance(values, dict) else []
        raise GradmemError(f"{path} is no recipe: unknown {extra}; known: {', '.join(sorted(known))}")
    return values


def _texts(value: Any) -> Iterator[str]:
    """All text in plain data, in which YAML may have one thing in many places."""
    waiting, seen = [value], set()
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict | list) and id(one) not in seen:
            seen.add(id(one))
            waiting += [*one, *one.values()] if isinstance(one, dict) else one


def _extended(other: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Fields of a recipe that extends another."""
    values = {**other, **own}
    for part in ("task", "backbone", "method"):
        of_other, of_own = other.get(part), own.get(part)
        if isinstance(of_other, dict) and isinstance(of_own, dict) and not IDENTITY & set(of_own):
            values[part] = {**of_other, **of_own}
    return values


def load_recipe(name: str, **changes: Any) -> Recipe:
    """Read a recipe, a packaged one by name or any by path, with some fields changed.

    Raises
    ------
    GradmemError
        When the file cannot be read or is no recipe.
    """
    values = {**recipe_values(name), **changes}
    try:
        return Recipe(**{**values, "stages": [Stage(**stage) for stage in values.get("stages", [])]})
    except TypeError as error:
        raise GradmemError(f"{name} is no recipe: {error}") from error
