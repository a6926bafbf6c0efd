"""A memory of keys and values as an adapter of PEFT, type CARTRIDGE.

The adapter is a directory: `adapter_config.json` says the sizes, and `adapter_model.safetensors` holds one tensor,
`prompt_embeddings` (positions, layers * 2 * heads * width), where the keys of a layer stand before its values.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from ..errors import GradmemError, refused
from ..files import write_bytes
from ..memory import LENGTHS, Memory
from .keys_values import keys_values

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EMBEDDINGS = "prompt_embeddings"


def save_cartridge(memory: Memory, directory: Path) -> int:
    """Save a memory as an adapter that `PeftModel.from_pretrained` of peft loads.

    Parameters
    ----------
    memory : Memory
        Of one row; see `keys_values`.
    directory : Path
        It is created if it does not exist. The two files of an adapter in it are replaced.

    Returns
    -------
    int
        Positions of the adapter, which are the entries of each head.

    Raises
    ------
    GradmemError
        If the memory cannot be exported, or the directory cannot be written.
    """
    found = keys_values(memory)
    layers, heads, entries, width = found.keys.shape
    if found.keys.shape != found.values.shape:
        raise GradmemError("the model's keys and values have different widths, which a cartridge cannot have")
    # (layers, keys and values, heads, entries, width) -> (entries, everything else)
    embeddings = torch.stack([found.keys, found.values], 1).permute(3, 0, 1, 2, 4).reshape(entries, -1)
    config = {
        "peft_type": "CARTRIDGE",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": memory.receipts[0].model if memory.receipts else None,
        "inference_mode": True,
        "num_layers": layers,
        "num_attention_heads": heads,
        "token_dim": heads * width,
        "num_virtual_tokens": entries,
        "num_transformer_submodules": 1,
    }
    write_bytes(directory / WEIGHTS, save({EMBEDDINGS: embeddings.float().cpu().contiguous()}, {"format": "pt"}))
    write_bytes(directory / CONFIG, json.dumps(config, indent=2).encode())
    return entries


def load_cartridge(directory: Path) -> Memory:
    """Load an adapter as a memory of keys and values, of one row and without receipts.

    Raises
    ------
    GradmemError
        If the directory holds no adapter of type CARTRIDGE, or its sizes do not fit together.
    """
    with refused(f"{directory} holds no adapter of type CARTRIDGE"):
        config: dict[str, Any] = json.loads((directory / CONFIG).read_bytes())
        if config["peft_type"] != "CARTRIDGE":
            raise ValueError(f"its type is {config['peft_type']}")
        names = ("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim")
        entries, layers, heads, dim = (int(config[name]) for name in names)
        embeddings = load((directory / WEIGHTS).read_bytes())[EMBEDDINGS]
        if min(entries, layers, heads, dim) < 1 or dim % heads or embeddings.shape != (entries, layers * 2 * dim):
            raise ValueError(f"{EMBEDDINGS} of shape {tuple(embeddings.shape)} does not fit {CONFIG}")
    keys, values = embeddings.float().view(entries, layers, 2, heads, -1).permute(2, 1, 3, 0, 4).flatten(1, 3)
    return Memory(
        {
            "keys": keys[None],
            "values": values[None],
            "counts": torch.full((1, layers, heads), entries),
            "before": torch.zeros(1, layers, heads, dtype=torch.long),
            "start": torch.tensor([entries]),
            LENGTHS: torch.tensor([len(keys)]),
        }
    )
