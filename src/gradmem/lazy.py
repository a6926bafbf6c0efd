"""Import the names of a package at first use, as importing PyTorch and transformers takes seconds."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def attach(package: str, modules: dict[str, str], *, submodules: bool = False) -> Callable[[str], Any]:
    """Build the `__getattr__` of a package (PEP 562).

    Parameters
    ----------
    package : str
        Name of the package.
    modules : dict of str
        Public names, each with the submodule that defines it; `module:name` if the submodule calls it by another name.
    submodules : bool
        Whether submodules can be used without importing them.
    """

    def getattr_(name: str) -> Any:
        if name in modules:
            module, _, original = modules[name].partition(":")
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
    """Switch garbage collection off: imports create many objects that stay, and searching them takes time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
