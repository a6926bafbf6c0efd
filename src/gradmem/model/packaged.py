"""Checkpoints that have a name: in the package, in a clone of the repository, or downloaded."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from ..errors import GradmemError, unknown
from ..files import cache_directory

HUB = "gradmem/checkpoints"
"""Where checkpoints are downloaded from, unless the user names another place."""
DELTA = "delta.json"
"""Config of a checkpoint that is the difference to a pretrained model."""
DOWNLOADABLE = {
    "english": "c775402689d3ef983566095ba3cdfbdf07ddc4f0195dbedfc66686021b53a65c",
    "english-pooled": "8ed23753fcdbb9f2a22be70cfb78a28314a19ff65d5d5244835745d811edc81c",
    "kv-128": "e667713e4fd24d0e20344d4f2effc1b699a3fc7ebb5a91fc9128f28ce45110c8",
    "kv-128-k30": "b023211f689b4fed04114eea3e915ce3aa4a884fb0fb0af36775393a4abe6edc",
    "kv-192": "ce41abf66264c3d6485c8b66cb71220773e60ddc52c4699e5fb1d32c8bebe0f6",
    "kv-64": "8586f7270843c233493866fe59f5537ff24f101e59d40f739e1db7def96d2497",
    "kv-64-k1": "1d2014816dc3f9f7f957f688f86949bed8b400de9cf5f71eb6f35b946d817e2e",
    "kv-96": "e968dcbdb9a4ec5f05108e0eab7fa8a7bdb08a87b9eb2069f9869da7c5d9182f",
}
"""Checkpoints that are not in the package, and their fingerprints: SHA-256 of weights, settings and tokenizer."""


def downloads() -> Path:
    """Return the folder that downloaded checkpoints are put into."""
    return cache_directory() / "checkpoints"


def checkpoint_names() -> list[str]:
    """Names of the checkpoints that can be loaded without a network."""
    return sorted({path.name for folder in _folders() if folder.is_dir() for path in folder.iterdir() if _whole(path)})


def served_names() -> list[str]:
    """Names of the checkpoints and language models that can be loaded here, those that read English first."""
    from ..pretrained import installed_models

    models, names = installed_models(), checkpoint_names()
    packed = [name for name in names if _packed(name)]
    return [*(packed if models else []), *models, *(name for name in names if name not in packed)]


def _packed(name: str) -> bool:
    """Whether a checkpoint needs a language model that comes as a Python package."""
    return any((folder / name / DELTA).is_file() for folder in _folders())


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
    return any((directory / name).is_file() for name in ("config.json", DELTA))
