"""The programs that memories are exported to, by name."""

from __future__ import annotations

from pathlib import Path

from ..errors import GradmemError
from ..model import BoundMemory
from .cartridge import save_cartridge
from .llama_cpp import save_state
from .prompt_embeds import has_vectors, save_lists, save_tensor
from .served import check_served
from .vllm import save_keys_values


def export(memory: BoundMemory, to: str, output: Path, served: Path | None = None) -> str:
    """Export a memory for another program.

    Parameters
    ----------
    memory : BoundMemory
    to : {"cartridge", "llama.cpp", "sglang", "vllm"}
    output : Path
        File; for a cartridge a directory.
    served : Path, optional
        The language model that the program runs, from `gradmem.exports.served.save_language_model`. Not needed for
        memories of a plain language model.

    Returns
    -------
    str
        What was exported.

    Raises
    ------
    GradmemError
        If this memory cannot be exported there; the message says why.
    """
    check_served(memory.model, served)
    if to == "cartridge":
        return f"{save_cartridge(memory, output)} positions"
    if to == "llama.cpp":
        return f"{save_state(memory, output)} positions"
    if to == "sglang":
        if not has_vectors(memory.model.method):
            raise GradmemError("SGLang takes no keys and values from files: export to llama.cpp, vllm or cartridge")
        return f"{save_lists(memory, output)} embeddings"
    if has_vectors(memory.model.method):
        return f"{save_tensor(memory, output)} embeddings"
    return f"{save_keys_values(memory, output)} positions"
