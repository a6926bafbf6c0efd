"""Methods, tasks and recipes by name: those of gradmem, those of installed packages, and modules of the user's own.

A package offers its own by entry points, so that `pip install` is all that its users do::

    [project.entry-points."gradmem.methods"]
    mymethod = "mypackage.mymethod"

In the groups `gradmem.methods` and `gradmem.tasks` an entry point names a module that defines one method or one task.
In the group `gradmem.recipes` it names a package, or a directory inside one, that holds recipes as YAML files. Names
come from the metadata of the packages: nothing of a plug-in is imported before it is used.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import GradmemError, reason, require, unknown


def names(group: str) -> list[str]:
    """Names of the methods (`gradmem.methods`) or tasks (`gradmem.tasks`) there are; none of them is imported.

    A plug-in with the name of a method or task of gradmem is ignored, with a warning.
    """
    return sorted({*_own(group), *_installed(group)})


def find(base: Any, group: str, kind: str, name: str, *, trusted: bool = True) -> Any:
    """Return the subclass of `base` that a name stands for.

    Parameters
    ----------
    base : type
    group : str
        The package whose files are looked up, which is also the group of entry points of installed packages.
    kind : str
        What to call it in messages.
    name : str
        A file of the package `group`; an entry point of an installed package; or the dotted path of a module of the
        user's own: one that is installed, in a directory of `PYTHONPATH`, or imported already. The current directory
        does not count.
    trusted : bool
        False for names that come out of a file, as a checkpoint. Then a dotted path counts only if its module has been
        imported already: loading a file imports nothing that the user did not choose. Entry points count as the
        methods and tasks of gradmem do, since the user installed their package on purpose.

    Raises
    ------
    GradmemError
        If there is none of this name, it cannot be imported, or it does not define exactly one subclass of `base`.
    """
    require(f"the name of a {kind}", name, isinstance(name, str), "text")
    plugins, dotted = _installed(group), "." in name and _is_module(name)
    if name in _own(group):
        module = importlib.import_module(f"{group}.{name}")
    elif name in plugins:
        module = _plugin(plugins[name], kind, name)
    elif dotted and (trusted or name in sys.modules):
        module = sys.modules.get(name) or _imported(
            name, f"the {kind} '{name}'", " (install it, or name its directory in PYTHONPATH)"
        )
    elif dotted:
        raise GradmemError(f"this file needs the {kind} '{name}': import that module first, if you trust it")
    else:
        raise unknown(kind, name, names(group))
    found = [
        member
        for member in vars(module).values()
        if inspect.isclass(member) and issubclass(member, base) and member.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise GradmemError(
            f"{module.__name__} must define exactly one subclass of {base.__name__}, and it defines {len(found)}"
        )
    return found[0]


def directories(group: str) -> Iterator[tuple[str, Path]]:
    """Yield the directories that entry points name, each with the name of its package; nothing is imported.

    An entry point that names no directory is passed over, with a warning.
    """
    for name, offers in _installed(group).items():
        for package, value in offers.items():
            top, *inner = value.split(".")
            found = [path for path in (Path(place, *inner) for place in _places(top)) if path.is_dir()]
            if found and _is_module(value):
                yield package, found[0]
            else:
                warnings.warn(f"the package {package} has no directory {value} ({group}: {name})", stacklevel=2)


def installed(path: list[str]) -> list[str]:
    """Return the directories of a search path without the current one, unless `PYTHONPATH` names it.

    Python searches the current directory too, and its files may be anybody's: a command that is run there must not
    run them.
    """
    given = [os.path.realpath(place) for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    here = os.path.realpath(os.curdir)
    return [place for place in path if os.path.realpath(place) != here or here in given]


def check_options(cls: type, kind: str, options: dict[str, Any], given: tuple[str, ...] = ()) -> dict[str, Any]:
    """Refuse options that the constructor of `cls` does not have; `given` are passed by the caller."""
    known = [name for name in inspect.signature(cls).parameters if name not in given]
    for name in options:
        if name not in known:
            raise unknown(f"{kind} option", name, known)
    return options


def _own(group: str) -> list[str]:
    """Names of the files of a package; `base` and private modules are none."""
    spec = find_spec(group)
    found = pkgutil.iter_modules(spec.submodule_search_locations if spec else None)
    return [info.name for info in found if info.name != "base" and info.name[0] != "_"]


def _installed(group: str) -> dict[str, dict[str, str]]:
    """Entry points of a group by name: for each the packages that offer it, and what they name."""
    found = dict(_offered(tuple(_with_time(place) for place in installed(sys.path))).get(group, {}))
    for name in found.keys() & (() if group == "gradmem.recipes" else _own(group)):
        packages = ", ".join(found.pop(name))
        warnings.warn(f"'{name}' of the package {packages} is ignored: gradmem has its own ({group})", stacklevel=2)
    return found


def _with_time(place: str) -> tuple[str, int]:
    """A directory and when it changed, which installing a package does."""
    whole = os.path.realpath(place)
    return whole, os.stat(whole).st_mtime_ns if os.path.exists(whole) else 0


@lru_cache(maxsize=4)
def _offered(places: tuple[tuple[str, int], ...]) -> dict[str, dict[str, dict[str, str]]]:
    """Entry points of all groups of gradmem. The metadata of all packages is read once until a directory changes."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for package in distributions(path=[place for place, _ in places]):
        for entry in package.entry_points:
            if entry.group.startswith("gradmem."):
                found.setdefault(entry.group, {}).setdefault(entry.name, {}).setdefault(package.name, entry.value)
    return found


def _plugin(offers: dict[str, str], kind: str, name: str) -> ModuleType:
    if len(offers) > 1:
        raise GradmemError(f"several packages have a {kind} '{name}': uninstall all but one of {', '.join(offers)}")
    ((package, value),) = offers.items()
    if not _is_module(value):
        raise GradmemError(f"the {kind} '{name}' of the package {package} must name a module, not '{value}'")
    return _imported(value, f"the {kind} '{name}' of the package {package}")


def _places(package: str) -> list[str]:
    """Directories of a package that need not be imported."""
    with _searching_installed(), suppress(ValueError, ImportError):
        spec = find_spec(package)
        return list(spec.submodule_search_locations or []) if spec else []
    return []


def _is_module(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))


def _imported(module: str, what: str, advice: str = "") -> ModuleType:
    try:
        with _searching_installed():
            return importlib.import_module(module)
    except Exception as error:  # a module of others may fail in any way
        raise GradmemError(f"cannot import {what}: {reason(error)}{advice}") from error


@contextmanager
def _searching_installed() -> Iterator[None]:
    before = sys.path[:]
    sys.path[:] = installed(before)
    try:
        yield
    finally:
        sys.path[:] = before
