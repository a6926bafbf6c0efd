"""Options of a method, declared once: a dataclass gives names, types, defaults, descriptions and checks."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch

from ...errors import require

FLOAT32 = torch.finfo(torch.float32)
Constructor = TypeVar("Constructor", bound=Callable[..., None])


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of all options of methods.

    A field may be an int, a float, a bool, a text, a `Literal` of texts, or one of several of these or None. Each value
    is checked against the type of its field. Subclasses check ranges in their `__post_init__`, after that of this
    class.

    Raises
    ------
    GradmemError
        If a value is not of the type of its field, or is a float that float32, in which methods compute, cannot hold.
    """

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
            require(name, value, any(_fits(value, kind) for kind in kinds), _either([_described(k) for k in kinds]))


def keywords_of(options: type[Options]) -> Callable[[Constructor], Constructor]:
    """Show the fields of a dataclass as the keyword arguments of a constructor that takes `**options`.

    Recipes, checkpoints, the command line and error messages read names and defaults from the signature.
    """

    def decorate(constructor: Constructor) -> Constructor:
        own = [p for p in inspect.signature(constructor).parameters.values() if p.kind is not p.VAR_KEYWORD]
        fields = inspect.signature(options).parameters.values()
        constructor.__signature__ = inspect.Signature([*own, *fields])  # type: ignore[attr-defined]
        return constructor

    return decorate


def _fits(value: object, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind is float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        return value == 0 or FLOAT32.tiny <= abs(value) <= FLOAT32.max
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _described(kind: Any) -> str:
    """What a value of a type is, for an error message."""
    if get_origin(kind) is Literal:
        return _either(list(get_args(kind)))
    return {int: "a whole number", float: "a number that float32 holds", bool: "true or false", str: "a text"}.get(
        kind, "null"
    )


def _either(choices: list[str]) -> str:
    return " or ".join([", ".join(choices[:-1]), choices[-1]] if choices[1:] else choices)
