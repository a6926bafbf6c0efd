"""Checkpoints that have a name: in the package, in a clone of the repository, or downloaded."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from ..errors import GradmemError, unknown
from ..files import cache_directory

HUB = "gradmem/checkpoints"
"""Where checkpoints are downloaded from, unless the user names another place."""
DOWNLOADABLE = {
    "kv-128": "8a88448f3918d62a9f5c1d4048ae1234b3151d71294d85ea0a5cc12718fce6d3",
    "kv-64": "7b9ba4c4a54e810a1eecb3133ac6f7d843b97d80382c809ebd7c270212e93f65",
    "kv-64-k1": "e0babee813652004283e3909a34e04f324f587e60847283392d4ef18544c2405",
    "kv-96": "1c8602a39b2af80ae1aeda90b1250f193b55d3938bc3302742de6784f396b703",
}
"""Checkpoints that are not in the package, and the SHA-256 of their weights."""


def downloads() -> Path:
    """Return the folder that downloaded checkpoints are put into."""
    return cache_directory() / "checkpoints"


def checkpoint_names() -> list[str]:
    """Names of the checkpoints that can be loaded without a network."""
    return sorted({path.name for folder in _folders() if folder.is_dir() for path in folder.iterdir() if _whole(path)})


def checkpoint_path(name: str) -> Path | None:
    """Return the directory of a checkpoint by name, or None if there is none here.

    Raises
    ------
    GradmemError
        If it is one that has to be downloaded first.
    """
    if name in checkpoint_names():
        return next(folder / name for folder in _folders() if _whole(folder / name))
    if name in DOWNLOADABLE:
        raise GradmemError(f"the checkpoint '{name}' is not in the package: run gradmem download {name}")
    return None


def unknown_checkpoint(name: str) -> GradmemError:
    """Build the error for a name that no checkpoint has."""
    return unknown("checkpoint", name, {*checkpoint_names(), *DOWNLOADABLE})


def clone() -> Path | None:
    """Return the root of the repository if this package lies in a clone of it, as in an editable installation."""
    package = Path(str(resources.files("gradmem")))
    root = package.parents[1]
    return root if package == root / "src" / "gradmem" and (root / "pyproject.toml").is_file() else None


def _folders() -> list[Path]:
    root = clone()
    package = Path(str(resources.files("gradmem"))) / "checkpoints"
    return [package, *([root / "checkpoints"] if root else []), downloads()]


def _whole(directory: Path) -> bool:
    return (directory / "config.json").is_file()
