"""How the documents of a corpus are written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..choices import Precision


@dataclass(frozen=True)
class Options:
    """How documents are written.

    Attributes
    ----------
    checkpoint : str
        As `gradmem.load` takes it.
    method : dict or None
        Name and options of a method.
    chunk_size, steps : int or None
        As in `gradmem write`.
    precision : {"float32", "float16", "int8"}
    device : str
    """

    checkpoint: str
    method: dict[str, Any] | None = None
    chunk_size: int | None = None
    steps: int | None = None
    precision: Precision = "float32"
    device: str = "cpu"
