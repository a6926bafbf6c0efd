"""Recipes: training runs as typed data, with the same fields in YAML files, on the command line and in Python."""

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
    """Optimizer steps after which the stage ends, decay included."""
    write_steps: list[int] = field(default_factory=list)
    """Numbers of write steps K; one of them is drawn for each optimizer step. Default: the method's own number."""
    tasks: list[dict[str, Any]] = field(default_factory=lambda: [{}])
    """Task options that differ from the recipe's, such as `{pairs: 4}`; one entry is drawn for each optimizer step."""
    batch_size: int = 32
    """Contexts of an optimizer step, over all processes."""
    lr_scale: float = 1.0
    """Factor on all learning rates."""
    until_exact_match: float | None = None
    """Exact match that ends the stage early: on training batches, which are always new, mean over 10 steps."""
    warmup_steps: int = 30
    """Steps over which the learning rates rise from zero."""
    decay_steps: int = 0
    """Steps at the end of the stage over which the learning rates fall linearly to zero."""
    write_loss_weight: float | None = None
    """Weight of the write loss in the outer loss. Default: the recipe's."""

    def __post_init__(self) -> None:
        if self.max_steps < 1 or self.batch_size < 1 or min(self.write_steps, default=0) < 0:
            raise GradmemError(
                "a stage needs max_steps and batch_size of at least 1, and write_steps such as [3, 4, 5]"
            )
        if not self.tasks:
            raise GradmemError("a stage's tasks must be a list such as [{pairs: 4}], or be left out")
        if self.until_exact_match is not None and not 0 < self.until_exact_match <= 1:
            raise GradmemError(
                f"a stage's until_exact_match must be above 0 and at most 1, not {self.until_exact_match}"
            )
        if self.decay_steps > self.max_steps:
            raise GradmemError(
                f"a stage's decay_steps ({self.decay_steps}) must not be more than its max_steps ({self.max_steps})"
            )


@dataclass
class Recipe:
    """A training run from beginning to end."""

    task: dict[str, Any]
    """The task: its `name` and its options."""
    backbone: dict[str, Any]
    """The language model: `pretrained: NAME`, or `model_type` and fields of its Hugging Face config for random
    weights."""
    method: dict[str, Any]
    """The method: its `name` and its options."""
    stages: list[Stage]
    """The curriculum, one stage after the other."""
    init_from: str | None = None
    """Checkpoint to start from: name, directory or hub name. Weights of the same name and shape are copied, and
    rates and momentum of any number of write steps: those of further ones as the checkpoint takes them."""
    seed: int = 0
    """Seed of random weights, of samples, and of the tasks and K of each step."""
    precision: Precision = "auto"
    """Precision of matrix products; weights, sums and softmax stay float32. auto chooses at each stage: on CUDA tf32;
    on a CPU bf16 if it is faster and its meta-gradient differs from that of fp32 by at most 20 %, otherwise fp32."""
    device: str = "auto"
    """cpu, the name of an accelerator (cuda, mps, xpu), or auto: the accelerator if there is one, otherwise cpu."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """Optimizer of the matrices in the model's blocks; AdamW trains everything else."""
    muon_lr: float = 0.01
    """Learning rate of Muon."""
    adamw_lr: float = 1e-3
    """Learning rate of AdamW."""
    inner_adamw_lr: float | None = None
    """Learning rate of AdamW for learned inner learning rates and momentum. Default: adamw_lr."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    """Betas of AdamW."""
    clip_norm: float = 1.0
    """Largest norm of the meta-gradient; a longer one is scaled down to it."""
    write_loss_weight: float = 0.0
    """Weight of the write loss in the outer loss, for stages without their own; GradMem's write loss is that of the
    last write step. It helps a model to learn its first pairs; later it lowers exact match, because the memory then
    stores the keys as well."""
    strategy: Literal["auto", "unroll", "recompute", "compile"] = "auto"
    """How to differentiate through the write steps. unroll keeps the graph of all steps, recompute that of one step
    at a time; auto measures both at each stage and takes the fastest that fits into memory. compile runs compiled write
    steps: in 0.6 of the time on a CPU, after a minute or two of compiling for each length of context, so it suits long
    stages with contexts of one length; it needs a C++ compiler. On CUDA, auto also tries it if a stage takes more than
    twenty minutes."""
    micro_batch_size: int = 0
    """Contexts of one forward and backward pass; gradients of a batch add up. 0: measured at each stage."""
    max_minutes: float | None = None
    """Wall-clock minutes after which the run ends, wherever it is; all resumed parts count, validation does not. The
    learning rates fall to zero in the last part of this time, see `cooldown`."""
    cooldown: float = 0.15
    """Fraction of `max_minutes`, at its end, over which the learning rates fall linearly to zero."""
    save_every: int = 50
    """Optimizer steps between the states that a run can resume from."""
    valid_samples: int = 128
    """Contexts to validate on at the end of each stage. `valid.csv` has exact match with its 95 % interval."""
    valid_minutes: float | None = None
    """Minutes of training after which the model is validated on the way too, for a learning curve; by default never.
    The minutes of validation themselves do not count."""

    def __post_init__(self) -> None:
        if self.max_minutes is not None and self.max_minutes <= 0:
            raise GradmemError(f"max_minutes must be above 0, not {self.max_minutes}")
        if self.valid_minutes is not None and self.valid_minutes <= 0:
            raise GradmemError(f"valid_minutes must be above 0, not {self.valid_minutes}")
        if not 0 < self.cooldown <= 1:
            raise GradmemError(f"cooldown is a fraction of max_minutes: above 0 and at most 1, not {self.cooldown}")
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
        """Weight of the write loss in the outer loss of a stage."""
        return self.write_loss_weight if stage.write_loss_weight is None else stage.write_loss_weight


IDENTITY = {"name", "model_type", "pretrained"}
"""Fields that say which task, method or backbone it is; all others are its options."""


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
    """Read the fields of a recipe as plain data.

    A recipe with `extends: OTHER` takes the fields that it does not have from the other recipe, which is given by name,
    or as a path relative to this recipe's directory. If its task, backbone or method does not say which one it is
    (`name`, `model_type`, `pretrained`), it is the other recipe's with some options changed.

    Parameters
    ----------
    name : str
        Name, or path of a YAML file.
    extending : tuple of Path
        Recipes that extend this one, to find circles.

    Raises
    ------
    GradmemError
        If the file cannot be read, has an unknown field, or extends itself.
    """
    path = recipe_path(name)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise GradmemError(f"cannot read the recipe {path}: {error}") from error
    if any(text != visible(text) for text in _texts(values)):
        raise GradmemError(f"cannot read the recipe {path}: it contains control characters")
    if path in extending:
        raise GradmemError(f"{path} extends itself")
    if isinstance(values, dict) and "extends" in values:
        other = str(values.pop("extends"))
        other = other if other in recipe_names() else str(path.parent / other)
        values = _extended(recipe_values(other, (*extending, path)), values)
    _check_fields(path, values, Recipe)
    stages = values.get("stages")
    for stage in stages if isinstance(stages, list) else []:
        _check_fields(path, stage, Stage)
    return dict(values)


def _check_fields(path: Path, values: Any, kind: type[Recipe] | type[Stage]) -> None:
    """Refuse what is not a mapping of fields of a recipe or a stage."""
    known, what = {field.name for field in fields(kind)}, kind.__name__.lower()
    extra = sorted(map(str, set(values) - known)) if isinstance(values, dict) else []
    if extra or not isinstance(values, dict):
        wrong = f"a {what} has no field {', '.join(extra)}" if extra else f"a {what} must be a mapping of fields"
        raise GradmemError(f"{path} is not a recipe: {wrong}; fields of a {what}: {', '.join(sorted(known))}")


def _texts(value: Any) -> Iterator[str]:
    """All strings in plain data, each object once: YAML aliases can put one object into many places."""
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
    """Read a recipe by name or by path, with some fields changed.

    Parameters
    ----------
    name : str
        Name, or path of a YAML file.
    **changes
        Fields of `Recipe` to use instead of the file's.

    Raises
    ------
    GradmemError
        If the file cannot be read or is not a recipe.
    """
    values = {**recipe_values(name), **changes}
    try:
        return Recipe(**{**values, "stages": [Stage(**stage) for stage in values.get("stages", [])]})
    except TypeError as error:
        raise GradmemError(f"{name} is not a recipe: {error}") from error
