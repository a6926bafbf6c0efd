"""Names of a package that are imported where they are first used, since PyTorch and transformers take seconds."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def attach(package: str, places: dict[str, str], *, submodules: bool = False) -> Callable[[str], Any]:
    """Build the `__getattr__` of a package (PEP 562).

    Parameters
    ----------
    package : str
        Name of the package.
    places : dict of str
        The names it offers, and the submodule that each is defined in; `module:name` where it has another name there.
    submodules : bool
        Find submodules too, as if they had been imported.
    """

    def getattr_(name: str) -> Any:
        if name in places:
            module, _, original = places[name].partition(":")
            with uncollected():
                value = getattr(import_module(f"{package}.{module}"), original or name)
        elif submodules and not name.startswith("_") and find_spec(f"{package}.{name}"):
            value = import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)
        return value

    return getattr_


@contextmanager
def uncollected() -> Iterator[None]:
    """Collect no garbage: imports make many objects that all stay, and to search them takes a fifth of the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
