"""Load checkpoints by name, and open memory files with the checkpoint that wrote them."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from ..errors import GradmemError
from ..language_model import CONFIG
from ..lazy import uncollected
from ..memory import Memory
from ..pretrained import HUB_NAME, PACKAGED, is_gguf
from ..untrusted import check_counts, read_json
from .checkpoint_model import CHUNK_OPTIONS, NAMED
from .delta import load_delta
from .model import BoundMemory, MemoryModel
from .packaged import DELTA, checkpoint_names, checkpoint_path, unknown_checkpoint


@uncollected()
def load(name: str | os.PathLike[str], method: dict[str, Any] | None = None) -> MemoryModel:
    """Load a checkpoint or a plain language model.

    Parameters
    ----------
    name : str or path
        A packaged checkpoint, a directory, or a hub name `owner/model`. For a plain language model also a GGUF file, or
        the short name of a model that comes as a Python package.
    method : dict, optional
        For a plain language model, or a checkpoint of `full_context` or `compact`: `name` and options of a method that
        needs no training, by default `compact` and the checkpoint's own. For any checkpoint: `chunk_size` and
        `chunk_mode`, to cut contexts in another way than in training, and `gauss_newton_after`, to continue GradMem's
        descent by Gauss-Newton steps.

    Raises
    ------
    GradmemError
        If there is none of that name, it is damaged, or a checkpoint is given another method.
    """
    name = os.fspath(name)
    if name not in checkpoint_names() and _is_language_model(name):
        return MemoryModel.from_language_model(name, {"name": "compact"} | (method or {}))
    model = _checkpoint(name)
    if method and model.takes_methods and set(method) - {*CHUNK_OPTIONS, *model.method.runtime_options}:
        return model.with_method(method if "name" in method else {**model.spec["method"], **method})
    model.configure(method or {})
    return model


def _checkpoint(name: str) -> MemoryModel:
    if name not in checkpoint_names() and os.path.isdir(name):  # Path.is_dir raises for names that are too long
        return load_directory(Path(name))
    if (directory := checkpoint_path(name)) is not None:
        model = load_directory(directory)
        model.name = name
        return model
    if not _is_hub_name(name):
        raise unknown_checkpoint(name)
    try:
        return MemoryModel.from_pretrained(name)
    except GradmemError:
        raise
    except Exception as error:  # the hub client raises errors of several libraries
        raise GradmemError(f"'{name}' is no directory, and cannot be downloaded from the hub: {error}") from error


def load_directory(directory: Path) -> MemoryModel:
    """The checkpoint in a directory: whole, or the difference to a pretrained model."""
    return load_delta(directory) if (directory / DELTA).is_file() else MemoryModel.from_pretrained(directory)


def _is_hub_name(name: str) -> bool:
    return name.count("/") == 1 and bool(HUB_NAME.fullmatch(name)) and not os.path.exists(name)


def _is_language_model(name: str) -> bool:
    """Whether a name stands for a plain language model: its config has no checkpoint format."""
    if is_gguf(name):
        return True
    file = Path(name) / CONFIG
    if _is_hub_name(name):
        try:
            file = Path(hf_hub_download(name, CONFIG))
        except Exception:  # loading will say what is wrong
            return False
    try:
        config = read_json(file)
    except GradmemError:
        return False
    return "format" not in config and "model_type" in config


def open_memory(path: str | os.PathLike[str], checkpoint: str | os.PathLike[str] | None = None) -> BoundMemory:
    """Load a memory file together with the checkpoint that wrote it.

    The file names its checkpoint, but a file may not decide what is loaded: unless the checkpoint comes with the
    package, you have to name it.

    Parameters
    ----------
    path : str or path
    checkpoint : str or path, optional
        Checkpoint or language model that wrote the memory, as for `load`; not needed for packaged checkpoints, and for
        those that this process has loaded before.

    Raises
    ------
    GradmemError
        If the file is damaged, or its checkpoint is not found, not named, or another one.
    """
    return bind_memory(Memory.load(path), str(path), checkpoint)


def bind_memory(memory: Memory, what: str, checkpoint: str | os.PathLike[str] | None = None) -> BoundMemory:
    """Bind a memory to the checkpoint that wrote it, which is loaded; see `open_memory`.

    Parameters
    ----------
    memory : Memory
    what : str
        What messages call the memory.
    checkpoint : str or path, optional

    Raises
    ------
    GradmemError
        If the checkpoint is not found, not named, or another one.
    """
    if not memory.receipts:
        raise GradmemError(f"{what} does not say which model wrote it")
    receipt = memory.receipts[0]
    name = receipt.model if checkpoint is None else os.fspath(checkpoint)
    if checkpoint is None and name not in {*PACKAGED, *NAMED} and checkpoint_path(name) is None:
        raise GradmemError(
            f"{what} says that '{name}' wrote it, and a file does not decide what is loaded: name the model if you "
            f"trust it, as --checkpoint {shlex.quote(name)} (in Python: checkpoint={name!r})"
        )
    if name in checkpoint_names() or not _is_language_model(name):
        return load(name).bind(memory, what)
    # A plain language model has no method of its own, unlike a checkpoint.
    check_counts(receipt.options, max(size for tensor in memory.tensors.values() for size in tensor.shape))
    return load(name, {"name": receipt.method, **receipt.options}).bind(memory, what)
