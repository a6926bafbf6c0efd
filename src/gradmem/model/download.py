"""Fetching checkpoints that are not in the package."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from huggingface_hub import snapshot_download

from ..errors import GradmemError, refused
from ..files import atomic_directory
from ..pretrained import HUB_NAME
from ..untrusted import WEIGHTS
from .checkpoint import FILES
from .loading import load_directory
from .packaged import DELTA, DOWNLOADABLE, HUB, checkpoint_names, checkpoint_path, downloads, unknown_checkpoint

COPIED = [*FILES, "delta*.safetensors", DELTA, "README.md", "recipe.yaml"]
"""Files that are fetched: those of a checkpoint, its model card and its recipe."""


def download(name: str, source: str | os.PathLike[str] = HUB) -> Path:
    """Fetch a checkpoint into the cache, where `gradmem.load` finds it by name; one that is there is left alone.

    It appears whole or not at all, and only if it loads and has the published weights, settings and tokenizer. Nothing
    that its files contain is executed.

    Parameters
    ----------
    name : str
    source : str or path
        A directory or a repository on the Hugging Face hub that has the checkpoint in a folder of its name.

    Returns
    -------
    Path
        The directory of the checkpoint.

    Raises
    ------
    GradmemError
        If there is no such checkpoint, the source does not have it, it is not the published one, or it cannot be
        written.
    """
    if name not in DOWNLOADABLE or name in checkpoint_names():
        here = checkpoint_path(name)
        if here is None:
            raise unknown_checkpoint(name)
        return here
    directory = _fetched(name, os.fspath(source))
    if load_directory(directory).fingerprints["checkpoint"] != DOWNLOADABLE[name]:
        raise GradmemError(f"{directory} is damaged or not the published '{name}': nothing was installed")
    _install(directory, downloads() / name)
    return downloads() / name


def _fetched(name: str, source: str) -> Path:
    """The directory of a checkpoint in its source; from the hub it is brought into the cache of `huggingface_hub`."""
    folder = Path(source)
    if not folder.is_dir():
        if not HUB_NAME.fullmatch(source) or folder.exists():
            raise GradmemError(f"there is no directory {source}")
        with refused(f"cannot download '{name}' from {source} (--source takes another hub name, or a directory)"):
            folder = Path(snapshot_download(source, allow_patterns=[f"{name}/{file}" for file in COPIED]))
    if not any((folder / name / file).is_file() for file in (WEIGHTS, DELTA)):
        raise GradmemError(f"{source} has no checkpoint '{name}': it needs a folder of this name with {WEIGHTS}")
    return folder / name


def _install(directory: Path, target: Path) -> None:
    try:
        with atomic_directory(target) as whole:
            for file in {file for pattern in COPIED for file in directory.glob(pattern) if file.is_file()}:
                shutil.copyfile(file, whole / file.name)
    except OSError as error:
        what = error.strerror or error
        raise GradmemError(f"cannot write {target} ({what}): set GRADMEM_CACHE to another directory") from error
