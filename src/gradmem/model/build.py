"""Build tasks, methods and backbones from plain data: a `name` and options, as in recipes and checkpoints."""

from __future__ import annotations

import inspect
from typing import Any

from .. import methods, tasks
from ..backbone import Backbone
from ..errors import GradmemError, reason
from ..methods.base import Method
from ..plugins import check_options, find
from ..pretrained import unspoken
from ..tasks.base import Task
from ..untrusted import Stored

Spec = dict[str, Any]


def build_task(spec: Spec, *, trusted: bool = True) -> Task:
    """Build a task from its `name` and options."""
    cls = find(Task, tasks.__name__, "task", spec["name"], trusted=trusted)
    options = {key: value for key, value in spec.items() if key != "name"}
    return _construct(cls, f"{spec['name']} task", (), options)


def method_class(spec: Spec, *, trusted: bool = True) -> type[Method]:
    """The class of a method, by its `name` and options."""
    found: type[Method] = find(Method, methods.__name__, "method", spec["name"], trusted=trusted)
    return found.variant(spec)


def build_method(spec: Spec, backbone: Backbone, *, trusted: bool = True) -> Method:
    """Build a method from its `name` and options."""
    cls = method_class(spec, trusted=trusted)
    options = {key: value for key, value in spec.items() if key != "name"}
    return _construct(cls, f"{spec['name']} method", (backbone,), options)


def default_write_steps(spec: Spec) -> int:
    """Default number of write steps of a method, from its options, without building it."""
    cls = method_class(spec)
    option = inspect.signature(cls).parameters.get("write_steps")
    return int(spec.get("write_steps", option.default if option else cls.write_steps))


def build_backbone(spec: Spec, task: Task, stored: Stored | None = None) -> Backbone:
    """Build a backbone from `pretrained: NAME` (with `dtype`, `lora`) or the fields of a config, for a tokenizer.

    Parameters
    ----------
    spec : dict
    task : Task
    stored : Stored, optional
        The weights of a checkpoint, which limit the size of the model; a checkpoint may not name a pretrained model.

    Raises
    ------
    GradmemError
        If a field is refused, the model is too large, or a checkpoint names a pretrained model.
    """
    if "pretrained" in spec:
        options = {key: value for key, value in spec.items() if key != "pretrained"}
        if extra := sorted(options.keys() - {"dtype", "lora"}):
            raise GradmemError(f"a pretrained backbone takes no other options: leave out {', '.join(extra)}")
        if stored is not None:
            raise GradmemError("its config names a pretrained model, but a checkpoint must hold all its weights")
        size, spare = len(task.tokenizer), unspoken(task.tokenizer)
        return Backbone.from_pretrained(spec["pretrained"], size, spare, **options)
    fields = {"vocab_size": len(task.tokenizer), "pad_token_id": task.pad_id, "eos_token_id": task.end_id}
    return Backbone.from_config({**fields, **spec}, stored)


def _construct(cls: type, kind: str, given: tuple[Any, ...], options: dict[str, Any]) -> Any:
    check_options(cls, kind, options, ("backbone",))
    try:
        inspect.signature(cls).bind(*given, **options)  # its errors name options, not our functions
        return cls(*given, **options)
    except TypeError as error:
        raise GradmemError(f"{kind}: {reason(error)}") from error
