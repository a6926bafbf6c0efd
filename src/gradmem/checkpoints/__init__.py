"""Checkpoints by name: those in the package, directories, and the hub."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from ..data.gguf import pretrained_place
from ..errors import GradmemError, unknown
from ..lazy import uncollected
from ..memory import Memory
from ..model import CONFIG, MemoryModel
from ..packaged import FOLDER, checkpoint_names


@uncollected()
def load(name: str | os.PathLike[str], method: dict[str, Any] | None = None) -> MemoryModel:
    """Load a checkpoint (a name of the package, a directory, or a hub name `owner/model`) or a plain language model.

    Parameters
    ----------
    name : str or path
        For a plain language model also a GGUF file, or the short name of a model that comes as a Python package.
    method : dict, optional
        For a plain language model: `name` and options of a method that needs no training, by default `cram`. For a
        checkpoint: `chunk` and `chunks`, where contexts are to be cut in another way than in training, and
        `gauss_newton_after`, where GradMem is to go on by other steps.

    Raises
    ------
    GradmemError
        When there is none of that name, it is damaged, or a checkpoint is given another method.
    """
    name = os.fspath(name)
    if name not in checkpoint_names() and _is_language_model(name):
        return MemoryModel.from_language_model(name, {"name": "cram"} | (method or {}))
    model = _checkpoint(name)
    model.choose(method or {})
    return model


def _checkpoint(name: str) -> MemoryModel:
    if name in checkpoint_names():
        model = MemoryModel.from_pretrained(str(FOLDER / name))
        model.name = name
        return model
    if Path(name).is_dir():
        return MemoryModel.from_pretrained(name)
    if not _is_hub_name(name):
        raise unknown("checkpoint", name, checkpoint_names())
    try:
        return MemoryModel.from_pretrained(name)
    except GradmemError:
        raise
    except Exception as error:  # the hub client raises its own, requests' and the system's errors
        raise GradmemError(f"'{name}' is no directory, and the hub does not give it: {error}") from error


def _is_hub_name(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/")) and not Path(name).exists()


def _is_language_model(name: str) -> bool:
    """Whether a name stands for a plain language model, whose config is without our format."""
    file = str(Path(pretrained_place(name)) / CONFIG)
    if _is_hub_name(name):
        try:
            file = hf_hub_download(name, CONFIG)
        except Exception:  # whatever is wrong, loading says so
            return False
    try:
        config = json.loads(Path(file).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "format" not in config and "model_type" in config


def open_memory(path: str | os.PathLike[str]) -> Memory:
    """Load a memory file together with the checkpoint that wrote it.

    Raises
    ------
    GradmemError
        When the file is damaged, or its checkpoint is not found or has changed.
    """
    return bind_memory(Memory.load(path), str(path))


def bind_memory(memory: Memory, what: str) -> Memory:
    """Bind a loaded memory to the checkpoint that wrote it, which is loaded too.

    Raises
    ------
    GradmemError
        When the checkpoint is not found or has changed.
    """
    if not memory.records:
        raise GradmemError(f"{what} does not say which model wrote it")
    record = memory.records[0]
    # Only a plain language model needs to be told the method: a checkpoint knows.
    method = {"name": record.method, **record.options} if _is_language_model(record.model) else None
    return load(record.model, method).bind(memory, what)
