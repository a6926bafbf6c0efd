"""Options of methods: one declaration gives names, defaults, descriptions and checks."""

from __future__ import annotations

import inspect
import sys
import types
from dataclasses import dataclass, fields
from typing import Any, Literal

import docstring_parser
import pytest

from gradmem import GradmemError, MemoryModel, methods
from gradmem.backbone import Backbone
from gradmem.methods import GradMem
from gradmem.methods.base.options import Options, keywords_of
from gradmem.methods.gradmem import GradMemOptions
from gradmem.methods.mean_pool import MeanPool

TASK: dict[str, Any] = {"name": "kv", "pairs": 3}
BACKBONE = {"model_type": "gpt2", "n_embd": 16, "n_inner": 24, "n_layer": 1, "n_head": 2, "n_positions": 128}


@dataclass(frozen=True, kw_only=True)
class Kinds(Options):
    whole: int = 1
    number: float | None = 0.5
    flag: bool = False
    choice: Literal["one", "two", "three"] = "one"


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"whole": 1.0}, "whole must be a whole number, not 1.0"),
        ({"whole": True}, "whole must be a whole number, not True"),
        ({"whole": None}, "whole must be a whole number, not None"),
        ({"number": "1e-3"}, "number must be a number that float32 holds or null, not '1e-3'"),
        ({"number": 1e300}, "number must be a number that float32 holds or null, not 1e+300"),
        ({"number": -(10**400)}, "number must be a number that float32 holds or null, not -1"),
        ({"number": 1e-300}, "number must be a number that float32 holds"),
        ({"number": float("nan")}, "number must be a number that float32 holds"),
        ({"number": float("inf")}, "number must be a number that float32 holds"),
        ({"flag": 1}, "flag must be true or false, not 1"),
        ({"choice": "four"}, "choice must be one, two or three, not 'four'"),
        ({"choice": ["one"]}, "choice must be one, two or three"),
    ],
    ids=str,
)
def test_values_are_checked_against_their_types(options: dict[str, Any], wanted: str) -> None:
    with pytest.raises(GradmemError) as refused:
        Kinds(**options)
    assert str(refused.value).startswith(wanted)


@pytest.mark.parametrize(
    "options", [{"number": None}, {"number": 0}, {"number": -3e38}, {"flag": True}, {"choice": "two"}]
)
def test_good_values_are_kept(options: dict[str, Any]) -> None:
    (name, value), *_ = options.items()
    assert getattr(Kinds(**options), name) == value


def test_the_signature_shows_the_fields() -> None:
    backbone, *shown = inspect.signature(GradMem).parameters.values()
    assert backbone.name == "backbone"
    assert {one.name: one.default for one in shown} == {one.name: one.default for one in fields(GradMemOptions)}
    assert {one.kind for one in shown} == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize(
    "module", [sys.modules[f"{methods.__name__}.{name}"] for name in ("gradmem", "rmt", "armt", "cram", "mamba")]
)
def test_each_option_is_described(module: types.ModuleType) -> None:
    cls = max((o for n, o in vars(module).items() if n.endswith("Options")), key=lambda one: len(one.__mro__))
    described = {
        one.arg_name
        for base in cls.__mro__[:-1]
        for one in docstring_parser.parse_from_object(base).params
        if one.description
    }
    assert {one.name for one in fields(cls)} <= described


def plug_in(monkeypatch: pytest.MonkeyPatch, cls: type) -> str:
    """Name of a method in a module of the user's own."""
    module = types.ModuleType("my.method")
    cls.__module__ = module.__name__
    module.Mine = cls  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.__name__


@pytest.mark.parametrize("declared", [False, True])
def test_a_method_may_have_plain_keyword_arguments(declared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(MeanPool):
        def __init__(self, backbone: Backbone, *, n_mem: int = 2, scale: float = 1.0) -> None:
            super().__init__(backbone, n_mem=n_mem)
            self.scale = scale

    class Declared(MeanPool):
        @keywords_of(Kinds)
        def __init__(self, backbone: Backbone, **options: Any) -> None:
            super().__init__(backbone, n_mem=2)
            self.scale = Kinds(**options).number

    name = plug_in(monkeypatch, Declared if declared else Plain)
    option = "number" if declared else "scale"
    method = MemoryModel.from_spec(TASK, BACKBONE, {"name": name, option: 3.0}).method
    assert (method.n_mem, method.scale) == (2, 3.0)
    with pytest.raises(GradmemError, match=rf"unknown my\.method method option 'scal': .*known: .*{option}"):
        MemoryModel.from_spec(TASK, BACKBONE, {"name": name, "scal": 3.0})
