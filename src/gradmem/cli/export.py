"""`gradmem export` and `gradmem merge`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from ..errors import GradmemError, Missing
from .console import console

OUTPUTS = {"cartridge": "cartridge", "llama.cpp": "memory.bin", "sglang": "memory.json", "vllm": "memory.pt"}


def export(
    memory: Path,
    to: Literal["cartridge", "llama.cpp", "sglang", "vllm"] = "cartridge",
    checkpoint: str | None = None,
    served: Path | None = None,
    output: Path | None = None,
) -> None:
    """Export a memory for another program, which answers from it with the same language model.

    Vectors (gradmem, cram, rmt, vectors) become prompt embeddings or keys and values. A compacted cache (compact)
    becomes keys and values, if every head keeps as many entries: write it with --shared false.

    Parameters
    ----------
    memory
        Memory file, or id or name of a stored memory.
    to
        vllm: prompt embeddings, or keys and values for the connector of gradmem. sglang: input embeddings. llama.cpp:
        a sequence state, which its server restores into a slot. cartridge: an adapter of PEFT, type CARTRIDGE.
    checkpoint
        Checkpoint or language model that wrote the memory. Not needed for those that `gradmem list` shows, nor for the
        cartridge of a compacted cache.
    served
        Directory that `gradmem merge` wrote, which the program runs. Needed for memories of a trained checkpoint.
    output
        File, or directory of the adapter (short: -o). Default: memory.pt, memory.json, memory.bin or cartridge.
    """
    from ..exports.cartridge import save_cartridge
    from ..exports.keys_values import is_compacted
    from ..exports.targets import export as exported

    found, target = _load(memory), output or Path(OUTPUTS[to])
    if to == "cartridge" and is_compacted(found):
        made = f"{save_cartridge(found, target)} positions"
    else:
        from ..model.loading import bind_memory

        made = exported(bind_memory(found, str(memory), checkpoint), to, target, served)
    console.print(f"saved {target}: {made}", highlight=False, markup=False, soft_wrap=True)


def merge(checkpoint: str, output: Path = Path("model")) -> None:
    """Save the language model of a checkpoint, with its adapters of READ merged, for servers that answer from memories.

    The directory holds config, weights and tokenizer as Hugging Face lays them out; `gradmem export` checks it.

    Parameters
    ----------
    checkpoint
        Name of a checkpoint, directory or hub name of a checkpoint, or of a plain language model.
    output
        New directory (short: -o).
    """
    import gradmem

    from ..exports.served import save_language_model

    saved = save_language_model(gradmem.load(checkpoint), output)
    console.print(f"saved {saved}: serve it to answer from exported memories", highlight=False, soft_wrap=True)


def _load(memory: Path) -> Any:
    """Load a memory file or, if there is none, the stored memory of this id or name."""
    from ..memory import Memory
    from ..store import Store

    if os.path.exists(memory):  # Path.exists raises if a name is too long
        return Memory.load(memory)
    try:
        with Store(create=False) as store:
            return store.load(str(memory))
    except Missing as error:
        raise GradmemError(f"no memory file at {memory}, and {error}") from error
