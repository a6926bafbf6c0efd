"""Methods and tasks are found by file name: no registry to keep in step."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from typing import Any

from .errors import GradmemError, unknown


def names(package: str) -> list[str]:
    """Names of the plug-in files in a package; `base` and private modules are none."""
    path = importlib.import_module(package).__path__
    return sorted(info.name for info in pkgutil.iter_modules(path) if info.name != "base" and info.name[0] != "_")


def find(base: Any, package: str, kind: str, name: str, *, trusted: bool = True) -> Any:
    """Return the subclass of `base` that the file `name` defines.

    Parameters
    ----------
    name : str
        A file of `package`, or the dotted path of a module of the user's own.
    trusted : bool
        False for names that come out of a file: then a module of the user's own counts only when it has been
        imported already, so that loading a file never imports anything new.

    Raises
    ------
    GradmemError
        When there is no such file, or when it does not define exactly one public subclass.
    """
    known = names(package)
    if name in known:
        module = importlib.import_module(f"{package}.{name}")
    elif "." in name and (trusted or name in sys.modules):
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise GradmemError(f"cannot import the {kind} '{name}': {error}") from error
    elif "." in name:
        raise GradmemError(f"this file needs the {kind} '{name}': import that module first, if you trust it")
    else:
        raise unknown(kind, name, known)
    found = [
        member
        for member in vars(module).values()
        if inspect.isclass(member) and issubclass(member, base) and member.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise GradmemError(f"{module.__name__} must define exactly one subclass of {base.__name__}")
    return found[0]


def check_options(cls: type, kind: str, options: dict[str, Any], given: tuple[str, ...] = ()) -> dict[str, Any]:
    """Refuse options that the constructor of `cls` does not have; `given` are passed by the caller."""
    known = [name for name in inspect.signature(cls).parameters if name not in given]
    for name in options:
        if name not in known:
            raise unknown(f"{kind} option", name, known)
    return options
