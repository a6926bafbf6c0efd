"""The command `gradmem pack`."""

from __future__ import annotations

from pathlib import Path

import gradmem

from .console import console


def pack(
    checkpoint: str, pretrained: str = "smollm2-135m", rank: int | None = None, output: Path = Path("packed")
) -> None:
    """Save what training changed in a pretrained model: a checkpoint of a tenth of the size or less.

    Whoever loads it needs the pretrained model, which comes as a Python package.

    Parameters
    ----------
    checkpoint
        Checkpoint whose training started from the pretrained model.
    pretrained
        Short name of that model.
    rank
        Keep so many singular values of each matrix: all that LoRA of this rank has learned. Default: all values, in
        four bits.
    output
        Directory of the packed checkpoint (short: -o).
    """
    from ..model.delta import save_delta

    files = save_delta(gradmem.load(checkpoint), pretrained, output, rank=rank)
    size = sum(file.stat().st_size for file in files)
    console.print(f"saved {output}: {size / 1e6:.1f} MB; gradmem.load('{output}')", highlight=False, markup=False)
