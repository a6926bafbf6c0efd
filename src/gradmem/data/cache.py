"""A cache of tokenized data: one directory for each data set, written whole and read by memory mapping."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import GradmemError
from ..files import cache_directory
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


def digest_files(paths: Iterable[Path]) -> list[str]:
    """SHA-256 of each file.

    Raises
    ------
    GradmemError
        When one cannot be read.
    """
    digests = []
    for path in paths:
        try:
            with path.open("rb") as file:
                digest = hashlib.sha256()
                while part := file.read(1 << 20):
                    digest.update(part)
            digests.append(digest.hexdigest())
        except OSError as error:
            raise GradmemError(f"cannot read {path}: {error.strerror or error}") from error
    return digests


def _load(place: Path) -> Samples:
    texts = json.loads((place / TEXTS).read_text(encoding="utf-8"))
    arrays = {name: np.load(place / f"{name}.npy", mmap_mode="r") for name in texts["arrays"]}
    return Samples(arrays, texts["references"], texts["notes"])


def _save(samples: Samples, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=place.parent, prefix=".making-"))
    try:
        for name, array in samples.arrays.items():
            np.save(temporary / f"{name}.npy", array)
        texts = {"arrays": list(samples.arrays), "references": samples.references, "notes": samples.notes}
        (temporary / TEXTS).write_text(json.dumps(texts), encoding="utf-8")
        shutil.rmtree(place, ignore_errors=True)
        try:
            temporary.rename(place)
        except OSError:
            # Another process was faster, which is as good; anything else shows when it is read.
            _load(place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
