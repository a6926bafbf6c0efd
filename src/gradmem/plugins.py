"""Methods and tasks are found by file name: no registry to keep in step."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import sys
from types import ModuleType
from typing import Any

from .errors import GradmemError, require, unknown


def names(package: str) -> list[str]:
    """Names of the plug-in files in a package; `base` and private modules are none."""
    path = importlib.import_module(package).__path__
    return sorted(info.name for info in pkgutil.iter_modules(path) if info.name != "base" and info.name[0] != "_")


def find(base: Any, package: str, kind: str, name: str, *, trusted: bool = True) -> Any:
    """Return the subclass of `base` that the file `name` defines.

    Parameters
    ----------
    name : str
        A file of `package`, or the dotted path of a module of the user's own: one that is installed, in a directory of
        `PYTHONPATH`, or imported already. The current directory does not count.
    trusted : bool
        False for names that come out of a file: then a module of the user's own counts only when it has been
        imported already, so that loading a file never imports anything new.

    Raises
    ------
    GradmemError
        When there is no such file, or when it does not define exactly one public subclass.
    """
    known = names(package)
    require(f"the name of a {kind}", name, isinstance(name, str), "text")
    dotted = "." in name and all(part.isidentifier() for part in name.split("."))
    if name in known:
        module = importlib.import_module(f"{package}.{name}")
    elif dotted and (trusted or name in sys.modules):
        module = sys.modules.get(name) or _imported(name, kind)
    elif dotted:
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


def installed(path: list[str]) -> list[str]:
    """The places of a search path but for the current directory, unless `PYTHONPATH` names it.

    Python searches that too, and its files may be anybody's: what is run there must not run what lies there.
    """
    given = [os.path.realpath(place) for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    here = os.path.realpath(os.curdir)
    return [place for place in path if os.path.realpath(place) != here or here in given]


def _imported(name: str, kind: str) -> ModuleType:
    before = sys.path[:]
    sys.path[:] = installed(before)
    try:
        return importlib.import_module(name)
    except Exception as error:  # a module of the user's own may fail in any way
        raise GradmemError(
            f"cannot import the {kind} '{name}': {error} (install it, or name its directory in PYTHONPATH)"
        ) from error
    finally:
        sys.path[:] = before


def check_options(cls: type, kind: str, options: dict[str, Any], given: tuple[str, ...] = ()) -> dict[str, Any]:
    """Refuse options that the constructor of `cls` does not have; `given` are passed by the caller."""
    known = [name for name in inspect.signature(cls).parameters if name not in given]
    for name in options:
        if name not in known:
            raise unknown(f"{kind} option", name, known)
    return options
