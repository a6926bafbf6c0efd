"""What makes two models the same: all that changes what they compute, and nothing else."""

from __future__ import annotations

import hashlib
import inspect
import json
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from ..language_model import quiet
from ..memory import digest

BOOKKEEPING = {
    "transformers_version", "architectures", "auto_map", "_name_or_path", "name_or_path", "dtype", "torch_dtype",
    "use_cache", "return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward", "problem_type",
    "id2label", "label2id", "num_labels", "finetuning_task", "task_specific_params", "tokenizer_class", "torchscript",
    "pruned_heads", "use_bfloat16", "tf_legacy_loss", "tie_encoder_decoder", "gradient_checkpointing",
    "_attn_implementation_autoset", "init_std", "prefix",
}  # fmt: skip
"""Fields of a config that say where a model comes from, how it is stored, and how it was drawn: its weights and their
types are hashed themselves."""
PLACES = {"tokenizer", "data"}
"""Options of a task that say where files are: the tokenizer is hashed itself, and data is no part of a model."""


def model_config(config: PretrainedConfig) -> dict[str, Any]:
    """Fields of a config that change what the model computes and differ from the defaults of its class.

    The same model has the same fields when another version of transformers saves it: versions differ in the defaults
    that they write down, in the order of fields, and in what they note beside them.
    """
    try:
        with quiet():
            defaults = type(config)().to_dict()
    except Exception:  # a class whose own defaults do not fit together
        defaults = {}
    fields = config.to_dict()
    return {"model_type": fields["model_type"], **_changed(fields, defaults)}


def options_of(built: object, spec: dict[str, Any]) -> dict[str, Any]:
    """`name` and options of a task or a method, without those that its class has by default, and without places."""
    parameters = inspect.signature(type(built)).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    own = {name: value for name, value in spec.items() if name not in PLACES}
    return {name: _plain(value) for name, value in own.items() if name not in defaults or value != defaults[name]}


def digest_of(about: Any, tensors: dict[str, Tensor]) -> str:
    """SHA-256 of plain data and of tensors."""
    return hashlib.sha256((json.dumps(about, sort_keys=True) + digest(tensors)).encode()).hexdigest()


def _changed(fields: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Fields of a config, and of the configs in it, that differ from the defaults."""
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
    """A value as JSON reads it again, whole numbers always as integers."""
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        older = {"type"} if "rope_type" in value else set()  # the older name of the same
        return {str(name): _plain(part) for name, part in value.items() if name not in older}
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, str | int | float | None) else str(value)
