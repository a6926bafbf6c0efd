"""Language models from a config and safetensors: none of their code is executed, and no missing weight is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_model
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from .errors import GradmemError
from .untrusted import Stored, check_layers, read_json, stored_in, within

CONFIG, ADAPTER = "config.json", "adapter_config.json"
FOREIGN = {
    "auto_map", "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
    "experts_implementation", "_experts_implementation", "_experts_implementation_internal", "configuration_files",
    "transformers_weights", "fusion_config", "distributed_config", "name_or_path", "_name_or_path",
    "num_labels", "id2label", "label2id",
}  # fmt: skip
"""Fields of a config that name code, kernels or files, or belong to a classifier: they are ignored."""
FLOAT = "__float__"
"""Key by which transformers stores a number that JSON lacks, as in {"__float__": "Infinity"}."""
SHOWN = 3
"""Most weights that a message names."""


def built_model(fields: dict[str, Any], stored: Stored | None = None) -> PreTrainedModel:
    """Build a randomly initialized model from the fields of its Hugging Face config, `model_type` included.

    Parameters
    ----------
    fields : dict
    stored : Stored, optional
        Weights that will be loaded into the model, which may not be larger.

    Raises
    ------
    GradmemError
        If transformers does not know the model type, or the model is too large.
    """
    if stored is not None:
        _shell(config_of(fields, len(stored)), stored.limit)
    with quiet():
        return AutoModelForCausalLM.from_config(config_of(fields, None), trust_remote_code=False)


def loaded_model(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load a model from `config.json` and the safetensors in a directory; other files are not read.

    Parameters
    ----------
    directory : Path
    dtype : torch.dtype
        Type of the loaded weights.

    Raises
    ------
    GradmemError
        If a file is missing or damaged, weights are missing, quantized or of other shapes than the config says, or the
        directory holds an adapter.
    """
    if (directory / ADAPTER).exists():
        raise GradmemError(f"{directory} holds an adapter: merge it into its model (`merge_and_unload` of peft) first")
    fields = read_json(directory / CONFIG)
    stored = stored_in(directory)
    shell = _shell(config_of(fields, len(stored)), stored.limit)
    with quiet():
        model, found = type(shell).from_pretrained(
            None,
            config=shell.config,
            state_dict=dict(stored),
            dtype=dtype,
            ignore_mismatched_sizes=True,  # checked below, with their names
            output_loading_info=True,
        )
    check_complete(found, str(directory))
    return model


def check_complete(found: dict[str, Any], what: str) -> None:
    """Refuse a model of which not all weights were loaded.

    Parameters
    ----------
    found : dict
        Loading info of transformers.
    what : str
        What messages call the weights.

    Raises
    ------
    GradmemError
        If weights are missing, or of other shapes than the config says.
    """
    if other := sorted(found["mismatched_keys"]):
        name, stored, wanted = other[0]
        raise GradmemError(f"{what} does not fit its config: {name} is {tuple(stored)} and should be {tuple(wanted)}")
    if found["missing_keys"]:
        raise GradmemError(f"{what} is not complete: its weights lack {_some(found['missing_keys'])}")


def load_weights(module: nn.Module, file: Path) -> None:
    """Load a safetensors file into a module that has the same weights.

    Raises
    ------
    GradmemError
        If the file is damaged, or its weights are not those of the module.
    """
    stored = Stored([file])
    for key, weight in module.state_dict().items():
        if key in stored and tuple(stored[key].get_shape()) != tuple(weight.shape):
            found = tuple(stored[key].get_shape())
            raise GradmemError(f"{file} does not fit its config: {key} is {found} and should be {tuple(weight.shape)}")
    missing, unexpected = load_model(module, str(file), strict=False)
    for keys, wrong in ((missing, "lacks"), (unexpected, "is of another model: it has")):
        if keys:
            raise GradmemError(f"{file} {wrong} {_some(keys)}")


def config_of(fields: dict[str, Any], tensors: int | None) -> PretrainedConfig:
    """Build a config from its fields, ignoring those that name code or files.

    Parameters
    ----------
    fields : dict
    tensors : int, optional
        For fields from a file: the number of tensors in its weights file.

    Raises
    ------
    GradmemError
        If transformers does not know the model type, the weights are quantized, or there are more layers than tensors.
    """
    if tensors is not None:
        check_layers(fields, tensors)
    if fields.get("quantization_config"):
        raise GradmemError("the weights are quantized: use the model without quantization, or a GGUF file")
    own = _own(fields)
    kind = own.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        raise GradmemError(f"transformers {transformers.__version__} knows no model type {str(kind)[:40]!r}")
    if kind == "mistral" and "layer_types" in own:
        kind = "ministral"  # as transformers does with such files
    with quiet():
        return AutoConfig.for_model(kind, **own)


def _some(names: Iterable[str]) -> str:
    """The first few of some names."""
    ordered = sorted(names)
    more = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    return ", ".join(ordered[:SHOWN]) + more


def _own(value: Any) -> Any:
    """A value of a config without the ignored fields in it."""
    if isinstance(value, list):
        return [_own(part) for part in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {FLOAT}:
        return float(value[FLOAT])
    return {name: _own(part) for name, part in value.items() if name not in FOREIGN}


def _shell(config: PretrainedConfig, limit: int) -> PreTrainedModel:
    """Build the model without weights; refuse it if it is larger than allowed."""
    with quiet(), within(limit), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings and progress bars of transformers."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
