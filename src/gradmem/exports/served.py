"""The language model of a checkpoint by itself, as a directory that servers load."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import GradmemError, refused
from ..files import atomic_directory
from ..language_model import quiet
from ..lora import adapted_layers, merge
from ..model import MemoryModel
from ..untrusted import read_json

ORIGIN = "gradmem.json"
"""File in the directory that says which backbone it was written from."""


def save_language_model(model: MemoryModel, directory: Path) -> Path:
    """Save the language model with which a checkpoint reads: config, weights and tokenizer of Hugging Face.

    LoRA adapters of READ are merged into the weights, and those of WRITE are left out.

    Parameters
    ----------
    model : MemoryModel
    directory : Path
        It must not exist, or be empty.

    Raises
    ------
    GradmemError
        If the directory has files, or cannot be written.
    """
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise GradmemError(f"{directory} exists already: give a new directory")
    merged = merged_model(model)
    with refused(f"cannot write {directory}"), quiet(), atomic_directory(directory) as folder:
        merged.save_pretrained(folder)
        model.task.tokenizer.save_pretrained(folder)
        (folder / ORIGIN).write_text(json.dumps({"backbone": model.fingerprints["backbone"]}))
    return directory


def check_served(model: MemoryModel, directory: Path | None) -> None:
    """Refuse to export a memory of a checkpoint unless its own language model was saved for the server.

    Parameters
    ----------
    model : MemoryModel
        That wrote the memory. A plain language model is served as it is.
    directory : Path, optional
        What the server runs: written by `save_language_model`.

    Raises
    ------
    GradmemError
        If the checkpoint is a small model that no server loads, or the directory is missing or of another checkpoint.
    """
    if model.plain:
        return
    if model.spec["task"].get("tokenizer") is None:
        raise GradmemError(
            f"'{model.name}' is a small model with a vocabulary of its own, which these programs do not load: write "
            "with a language model"
        )
    if directory is None:
        adapters = " and LoRA adapters in READ" if _reads_adapted(model) else ""
        raise GradmemError(
            f"'{model.name}' has weights of its own{adapters}: merge it first (gradmem merge {model.name} -o DIR), let "
            "the server run DIR, and give --served DIR"
        )
    if read_json(directory / ORIGIN).get("backbone") != model.fingerprints["backbone"]:
        raise GradmemError(f"{directory} holds another model than '{model.name}': merge this one")


@torch.no_grad()
def merged_model(model: MemoryModel) -> PreTrainedModel:
    """Copy the language model of a checkpoint, with its adapters of READ merged and without those of WRITE."""
    merged: PreTrainedModel = copy.deepcopy(model.method.backbone.model)
    for parent, name, layer in adapted_layers(merged):
        merge(parent, name, layer, set(layer.lora_A) - {"write"})
    return merged


def _reads_adapted(model: MemoryModel) -> bool:
    """Whether LoRA adapters are active in READ."""
    adapters: list[Any] = getattr(model.method, "adapters", [])
    return any("read" in layer.lora_A for layer in adapters)
