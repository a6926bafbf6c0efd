"""The files of a checkpoint: a config, weights, a tokenizer and, if calibrated, when to abstain."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors.torch import save_model

from ..errors import GradmemError
from ..language_model import CONFIG
from ..lora import merged
from ..methods.base import Method
from ..tasks.base import Task
from ..untrusted import WEIGHTS, Stored, check_counts, read_json
from .abstain import FILE as ABSTAIN
from .abstain import Abstain
from .build import Spec

FORMAT = 2
FILES = [CONFIG, WEIGHTS, ABSTAIN, "tokenizer*.json", "special_tokens_map.json", "chat_template.jinja"]
"""Files of a checkpoint."""
MODEL_CARD = """---
{{ card_data }}
---

A model that writes texts into a memory and answers from the memory alone, as a checkpoint of gradmem:
`gradmem.load(DIRECTORY).write(text).ask(query)`. Say here what it was trained on, and how well it answers beside its
controls (`gradmem eval DIRECTORY`).
"""
"""The `README.md` of a checkpoint that has none; Jinja fills in the data of the hub."""
HERE = "."
"""In a config: the directory of the checkpoint itself."""
FIRST_FORMAT = (
    "train it again, or edit its config.json: rename the options `chunk` to `chunk_size`, `chunks` to `chunk_mode` and "
    "`settle` to `extra_step_decay`, rename the task `plain` to `raw_text`, and set `format` to 2"
)
"""What to do with a checkpoint of format 1."""


@dataclass(frozen=True)
class Checkpoint:
    """What the files of a checkpoint say, before a model is built from them.

    Attributes
    ----------
    specs : dict
        `task`, `backbone` and `method` as plain data.
    stored : Stored
        The weights, not loaded yet.
    weights : Path
        Their file.
    """

    specs: dict[str, Spec]
    stored: Stored
    weights: Path


def save(directory: Path, method: Method, task: Task, specs: dict[str, Spec], abstain: Abstain | None) -> None:
    """Write a checkpoint; each of its files is written whole or not at all, and other files are unchanged.

    Parameters
    ----------
    directory : Path
    method : Method
        Its weights are saved, those of its backbone included.
    task : Task
        Its tokenizer is saved.
    specs : dict
        `task`, `backbone` and `method` as plain data.
    abstain : Abstain, optional
    """
    with tempfile.TemporaryDirectory(dir=directory) as temporary:
        with merged(method):
            save_model(method, str(Path(temporary) / WEIGHTS))
        # A task without paths: its tokenizer is saved with it, and its data is not needed.
        portable = {name: value for name, value in specs["task"].items() if name != "data"}
        config = {"format": FORMAT, **specs, "task": _with_tokenizer(portable, HERE)}
        (Path(temporary) / CONFIG).write_text(json.dumps(config, indent=1))
        task.tokenizer.save_pretrained(temporary)
        if abstain:
            abstain.save(Path(temporary))
        else:
            (directory / ABSTAIN).unlink(missing_ok=True)  # it was for other weights
        for file in Path(temporary).iterdir():
            os.replace(file, directory / file.name)


def locate(name: str, **download: Any) -> Path:
    """The directory of a checkpoint: the one of this name, or else one that is downloaded from the hub."""
    directory = Path(name)
    return directory if directory.is_dir() else Path(snapshot_download(name, allow_patterns=FILES, **download))


def read(directory: Path) -> Checkpoint:
    """Read the config of a checkpoint, and check that it asks for no more than the weights hold.

    Raises
    ------
    GradmemError
        If a file is missing or damaged, or the checkpoint has another format.
    """
    if not (directory / CONFIG).is_file() or not (directory / WEIGHTS).is_file():
        raise GradmemError(f"{directory} is no checkpoint: it needs {CONFIG} and {WEIGHTS}")
    config = read_json(directory / CONFIG)
    if (found := config.get("format")) != FORMAT:
        advice = f": {FIRST_FORMAT}" if found == 1 else ""
        raise GradmemError(f"{directory} has checkpoint format {found!r}, this gradmem reads {FORMAT}{advice}")
    stored = Stored([directory / WEIGHTS])
    for part in ("task", "method"):
        check_counts(config[part], stored.largest)
    task = {name: value for name, value in config["task"].items() if name != "data"}
    specs = {
        "task": _with_tokenizer(task, str(directory)),
        "backbone": config["backbone"],
        "method": config["method"],
    }
    return Checkpoint(specs, stored, directory / WEIGHTS)


def read_abstain(directory: Path, checkpoint: str, width: int) -> Abstain | None:
    """Read when a checkpoint abstains; None if it is not calibrated.

    Parameters
    ----------
    directory : Path
    checkpoint : str
        Fingerprint of the checkpoint.
    width : int
        Model width d.

    Raises
    ------
    GradmemError
        If the file is damaged, or was made for another checkpoint.
    """
    abstain = Abstain.load(directory)
    if abstain and (abstain.checkpoint, abstain.width) != (checkpoint, 2 * width):
        raise GradmemError(f"{ABSTAIN} of {directory} is for another model: remove it, or calibrate again")
    return abstain


def _with_tokenizer(task: Spec, directory: str) -> Spec:
    """A task whose tokenizer, if that is an option, is the one in a directory."""
    return {**task, "tokenizer": directory} if task.get("tokenizer") is not None else task
