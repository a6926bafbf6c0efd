"""Model files from others: sizes that they state are checked against their weights before memory is allocated."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules import module as registration

from .errors import GradmemError, reason

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
LARGEST_JSON = 2**26
"""Most bytes of a JSON file: the index of a thousand layers has less than one hundredth of that."""
SPARE, COPIES = 2**26, 16
"""Bytes that a model may always take, and those for each number in its weights file: four in float32, twice as many
before weights are tied, and twice that."""
LEAST = 2**12
"""Bytes that a tensor counts at least, for what PyTorch keeps beside its numbers."""
COUNT = 2**16
"""Size that an option may always ask for."""
LAYERS = 2**10
"""Layers that a model may always have."""
OF_LAYERS = re.compile("layer|block|depth")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises
    ------
    GradmemError
        If it is missing, too large, nested too deeply, not UTF-8, or not a JSON object.
    """
    try:
        if not path.is_file():
            raise GradmemError(f"{path.parent} has no file {path.name}")
        if path.stat().st_size > LARGEST_JSON:
            raise GradmemError(f"{path} is damaged: it has more than {LARGEST_JSON:,} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise GradmemError(f"{path} is damaged: {reason(error)}") from error
    if not isinstance(found, dict):
        raise GradmemError(f"{path} is damaged: it is no JSON object")
    return found


class Stored(Mapping[str, Any]):
    """The tensors of safetensors files by name, read only when they are needed.

    Parameters
    ----------
    files : iterable of Path

    Raises
    ------
    GradmemError
        If a file is missing or damaged.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._slices: dict[str, Any] = {}
        for file in files:
            if not file.is_file():
                raise GradmemError(f"{file.parent} has no file {file.name}")
            try:
                opened = safe_open(file, "pt")
                self._slices |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118, no mapping
            except (OSError, SafetensorError) as error:
                raise GradmemError(f"{file} is damaged: {reason(error)}") from error

    def __getitem__(self, name: str) -> Any:
        return self._slices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._slices)

    def __len__(self) -> int:
        return len(self._slices)

    @property
    def numbers(self) -> int:
        """Number of elements of all tensors."""
        return sum(math.prod(part.get_shape()) for part in self._slices.values())

    @property
    def largest(self) -> int:
        """The largest dimension of any tensor."""
        return max((size for part in self._slices.values() for size in part.get_shape()), default=0)

    @property
    def limit(self) -> int:
        """Most bytes that a model with these tensors may take."""
        return SPARE + COPIES * self.numbers


def stored_in(directory: Path) -> Stored:
    """The weights in a directory: `model.safetensors`, or the files that its index lists.

    Raises
    ------
    GradmemError
        If there are none, a file is missing or damaged, or the index lists a file in another directory.
    """
    if (directory / WEIGHTS).is_file():
        return Stored([directory / WEIGHTS])
    if not (directory / INDEX).is_file():
        raise GradmemError(
            f"{directory} has no {WEIGHTS}: weights are read from safetensors only; convert others, if you trust them, "
            "with AutoModelForCausalLM.from_pretrained(DIRECTORY).save_pretrained(OTHER) of transformers"
        )
    named = read_json(directory / INDEX).get("weight_map")
    names = sorted({str(name) for name in named.values()}) if isinstance(named, dict) else []
    if not names or any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
        raise GradmemError(f"{directory / INDEX} is damaged: `weight_map` must name safetensors files beside it")
    return Stored(directory / name for name in names)


def check_layers(fields: Mapping[str, Any], tensors: int) -> None:
    """Refuse a config with more layers than its weights file has tensors, as transformers lists the layers of a config.

    Raises
    ------
    GradmemError
        If a field, or a field of a nested config, states too many.
    """
    most = max(LAYERS, tensors)
    for name, value in fields.items():
        if isinstance(value, Mapping):
            check_layers(value, tensors)
        elif isinstance(value, int | float) and value > most and OF_LAYERS.search(name) and "size" not in name:
            raise GradmemError(f"its config is damaged: {name} is {value}, and the weights are {tensors} tensors")


def check_counts(options: Mapping[str, Any], largest: int) -> None:
    """Refuse options of a task or a method that ask for larger sizes than a file holds.

    Raises
    ------
    GradmemError
        If an integer other than a seed is larger than all dimensions in the file.
    """
    for name, value in options.items():
        if isinstance(value, int) and value > max(COUNT, largest) and name != "seed":
            raise GradmemError(f"its options are damaged: {name} is {value}, and the file holds nothing of that size")


@contextmanager
def within(limit: int | None) -> Iterator[None]:
    """Refuse to build a model that takes more bytes than this; tensors on the device `meta` count too.

    Raises
    ------
    GradmemError
        If a parameter or buffer exceeds the limit, before it is initialized.
    """
    taken, thread = 0, threading.get_ident()

    def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal taken
        if tensor is None or threading.get_ident() != thread:
            return
        taken += max(LEAST, tensor.numel() * tensor.element_size())
        if limit is not None and taken > limit:
            raise GradmemError("its config is damaged: it describes a model that is larger than the weights file")

    hooks = [
        registration.register_module_parameter_registration_hook(count),
        registration.register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
