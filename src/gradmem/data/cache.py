"""A cache of tokenized data: one directory for each data set, written whole and read by memory mapping."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import GradmemError
from ..files import atomic_directory, cache_directory
from .samples import Samples

FORMAT = 1
TEXTS = "texts.json"


def cached(about: dict[str, Any], make: Callable[[], Samples]) -> Samples:
    """Return samples from the cache, or make them and put them there.

    Parameters
    ----------
    about : dict
        Everything that the samples depend on, as plain data: digests of files and tokenizer, and options.
    make : callable
        Makes the samples.

    Raises
    ------
    GradmemError
        If there are no samples, or the cache cannot be written.
    """
    key = hashlib.sha256(json.dumps({"format": FORMAT, **about}, sort_keys=True).encode()).hexdigest()
    place = cache_directory() / key[:32]
    try:
        return _load(place)
    except (OSError, ValueError, KeyError):
        pass  # missing or damaged
    samples = make()
    if not len(samples):
        raise GradmemError(f"no sample is left: {'; '.join(samples.notes) or 'the files hold none'}")
    try:
        _save(samples, place)
        return _load(place)
    except OSError as error:
        raise GradmemError(
            f"cannot write the data cache {place.parent} ({error.strerror or error}): set GRADMEM_CACHE to another path"
        ) from error


def _load(place: Path) -> Samples:
    texts = json.loads((place / TEXTS).read_text(encoding="utf-8"))
    arrays = {name: np.load(place / f"{name}.npy", mmap_mode="r") for name in texts["arrays"]}
    return Samples(arrays, texts["references"], texts["notes"])


def _save(samples: Samples, place: Path) -> None:
    with atomic_directory(place) as directory:
        for name, array in samples.arrays.items():
            np.save(directory / f"{name}.npy", array)
        texts = {"arrays": list(samples.arrays), "references": samples.references, "notes": samples.notes}
        (directory / TEXTS).write_text(json.dumps(texts), encoding="utf-8")
