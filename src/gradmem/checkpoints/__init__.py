"""Checkpoints by name: those in the package, directories, and the hub."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

from ..errors import GradmemError, unknown
from ..memory import Memory
from ..model import CONFIG, MemoryModel


def checkpoint_names() -> list[str]:
    """Names of the checkpoints in the package."""
    here = Path(str(resources.files(__name__)))
    return sorted(path.name for path in here.iterdir() if (path / CONFIG).is_file())


def load(name: str | os.PathLike[str]) -> MemoryModel:
    """Load a checkpoint: a name of the package, a directory, or a hub name `owner/model`.

    Raises
    ------
    GradmemError
        When there is none of that name, or it is damaged.
    """
    name = os.fspath(name)
    if name in checkpoint_names():
        model = MemoryModel.from_pretrained(str(resources.files(__name__) / name))
        model.name = name
        return model
    if Path(name).is_dir():
        return MemoryModel.from_pretrained(name)
    if name.count("/") != 1 or name.startswith((".", "/")) or Path(name).exists():
        raise unknown("checkpoint", name, checkpoint_names())
    try:
        return MemoryModel.from_pretrained(name)
    except GradmemError:
        raise
    except Exception as error:  # the hub client raises its own, requests' and the system's errors
        raise GradmemError(f"'{name}' is no directory, and the hub does not give it: {error}") from error


def open_memory(path: str | os.PathLike[str]) -> Memory:
    """Load a memory file together with the checkpoint that wrote it.

    Raises
    ------
    GradmemError
        When the file is damaged, or its checkpoint is not found or has changed.
    """
    memory = Memory.load(path)
    if not memory.records:
        raise GradmemError(f"{path} does not say which model wrote it")
    return load(memory.records[0].model).bind(memory, str(path))
