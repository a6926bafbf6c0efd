"""`gradmem export`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from .console import console


def export(memory: Path, to: Literal["cartridge"] = "cartridge", output: Path = Path("cartridge")) -> None:
    """Export a memory of keys and values for another program.

    Parameters
    ----------
    memory
        Memory file, or id or name of a stored memory.
    to
        cartridge: an adapter of PEFT, type CARTRIDGE, for the model that wrote the memory.
    output
        Directory of the adapter (short: -o).
    """
    from ..cartridge import save_cartridge
    from ..memory import Memory
    from ..store import Store

    if os.path.exists(memory):  # Path.exists raises if a name is too long
        found = Memory.load(memory)
    else:
        with Store(create=False) as store:
            found = store.load(str(memory))
    entries = save_cartridge(found, output)
    console.print(
        f'saved {output}: {entries} positions; peft: PeftModel.from_pretrained(MODEL, "{output}")',
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
