"""Fingerprints of models: hashes of everything that changes what a model computes, and of nothing else."""

from __future__ import annotations

import hashlib
import inspect
import json
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from ..language_model import quiet
from ..memory import digest
from ..methods.base import Method
from ..pretrained import digest_tokenizer
from ..tasks.base import Task

BOOKKEEPING = {
    "transformers_version", "architectures", "auto_map", "_name_or_path", "name_or_path", "dtype", "torch_dtype",
    "use_cache", "return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward", "problem_type",
    "id2label", "label2id", "num_labels", "finetuning_task", "task_specific_params", "tokenizer_class", "torchscript",
    "pruned_heads", "use_bfloat16", "tf_legacy_loss", "tie_encoder_decoder", "gradient_checkpointing",
    "_attn_implementation_autoset", "init_std", "prefix",
}  # fmt: skip
"""Fields of a config that say where a model comes from, how it is stored, and how its weights were drawn: the weights
and their types are hashed themselves."""
PLACES = {"tokenizer", "data"}
"""Options of a task that are paths: the tokenizer is hashed itself, and data is no part of a model."""


def fingerprints(method: Method, task: Task, spec: dict[str, dict[str, Any]]) -> dict[str, str]:
    """SHA-256 of the `backbone`, the whole `checkpoint` and the `tokenizer`: weights, and all settings that matter.

    Parameters
    ----------
    method : Method
    task : Task
    spec : dict
        `task` and `method` as plain data.
    """
    tokenizer = digest_tokenizer(task.tokenizer)
    backbone = {"config": model_config(method.backbone.model.config)}
    own = {"method": options_of(method, spec["method"]), "task": options_of(task, spec["task"])}
    if task.prompt_template is not None:
        own["task"] = {**own["task"], "prompt_template": task.prompt_template}
    return {
        "backbone": digest_of(backbone, method.backbone.state_dict()),
        "checkpoint": digest_of({**backbone, **own, "tokenizer": tokenizer}, method.state_dict()),
        "tokenizer": tokenizer,
    }


def model_config(config: PretrainedConfig) -> dict[str, Any]:
    """Fields of a config that change what the model computes and differ from the defaults of its class.

    They are the same whichever version of transformers saved the model: versions differ in the defaults that they
    store, in the order of fields, and in the notes that they add.
    """
    try:
        with quiet():
            defaults = type(config)().to_dict()
    except Exception:  # a class whose defaults contradict each other
        defaults = {}
    fields = config.to_dict()
    return {"model_type": fields["model_type"], **_changed(fields, defaults)}


def options_of(built: object, spec: dict[str, Any]) -> dict[str, Any]:
    """`name` and options of a task or a method, without default values and without paths."""
    parameters = inspect.signature(type(built)).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    own = {name: value for name, value in spec.items() if name not in PLACES}
    return {name: _plain(value) for name, value in own.items() if name not in defaults or value != defaults[name]}


def digest_of(about: Any, tensors: dict[str, Tensor]) -> str:
    """SHA-256 of plain data and of tensors."""
    return hashlib.sha256((json.dumps(about, sort_keys=True) + digest(tensors)).encode()).hexdigest()


def _changed(fields: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Fields of a config, and of nested configs, that differ from the defaults."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        default = defaults.get(name)
        if name in BOOKKEEPING or name.startswith("initializer_") or "drop" in name or value == default:
            continue
        if isinstance(value, dict) and "model_type" in value:
            found[name] = _changed(value, default if isinstance(default, dict) else {})
        else:
            found[name] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    """A value as it comes back from JSON, whole numbers always as integers."""
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        older = {"type"} if "rope_type" in value else set()  # an older name of `rope_type`
        return {str(name): _plain(part) for name, part in value.items() if name not in older}
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, str | int | float | None) else str(value)
