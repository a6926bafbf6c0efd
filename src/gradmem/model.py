"""A memory method with its tokenizer and task: what a checkpoint holds."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model

from . import methods, tasks
from .backbone import Backbone
from .errors import GradmemError
from .methods.base import Method
from .plugins import check_options, find
from .tasks.base import Task

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
Spec = dict[str, Any]


def build_task(spec: Spec, *, trusted: bool = True) -> Task:
    """Build a task from its `name` and options."""
    cls = find(Task, tasks.__name__, "task", spec["name"], trusted=trusted)
    options = {key: value for key, value in spec.items() if key != "name"}
    return _construct(cls, f"{spec['name']} task", (), options)


def build_method(spec: Spec, backbone: Backbone, *, trusted: bool = True) -> Method:
    """Build a method from its `name` and options."""
    cls = find(Method, methods.__name__, "method", spec["name"], trusted=trusted)
    options = {key: value for key, value in spec.items() if key != "name"}
    return _construct(cls, f"{spec['name']} method", (backbone,), options)


def build_backbone(spec: Spec, task: Task) -> Backbone:
    """Build a backbone from `pretrained: NAME` or the fields of a config; a new one fits the task's tokenizer."""
    if "pretrained" in spec:
        return Backbone.from_pretrained(spec["pretrained"])
    fields = {"vocab_size": len(task.tokenizer), "pad_token_id": task.pad_id, "eos_token_id": task.end_id}
    return Backbone.from_config({**fields, **spec})


def _construct(cls: type, kind: str, given: tuple[Any, ...], options: dict[str, Any]) -> Any:
    check_options(cls, kind, options, ("backbone",))
    try:
        return cls(*given, **options)
    except TypeError as error:
        raise GradmemError(f"{kind}: {error}") from error


class MemoryModel(ModelHubMixin):
    """A method with the task it was trained on; saves, loads and travels as a checkpoint.

    Parameters
    ----------
    method : Method
    task : Task
    spec : dict
        `task`, `backbone` and `method` as plain data, from which the same objects are built again.
    """

    def __init__(self, method: Method, task: Task, spec: dict[str, Spec]) -> None:
        self.method, self.task, self.spec = method, task, spec

    @classmethod
    def from_spec(cls, task: Spec, backbone: Spec, method: Spec, *, trusted: bool = True) -> MemoryModel:
        """Build a model with fresh (or pretrained) weights."""
        built_task = build_task(task, trusted=trusted)
        built = build_backbone(backbone, built_task)
        spec = {"task": dict(task), "backbone": built.model.config.to_diff_dict(), "method": dict(method)}
        spec["backbone"]["model_type"] = built.model.config.model_type
        return cls(build_method(method, built, trusted=trusted), built_task, copy.deepcopy(spec))

    def take_weights(self, checkpoint: str) -> None:
        """Warm start: take over every weight of a checkpoint that has the same name and shape."""
        raise NotImplementedError

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write config, weights and tokenizer; each file appears whole or not at all."""
        config = json.dumps({"format": FORMAT, **self.spec}, indent=1)
        with tempfile.TemporaryDirectory(dir=save_directory) as temporary:
            save_model(self.method, str(Path(temporary) / WEIGHTS))
            (Path(temporary) / CONFIG).write_text(config)
            self.task.tokenizer.save_pretrained(temporary)
            for file in Path(temporary).iterdir():
                os.replace(file, save_directory / file.name)
