"""`gradmem download`, as a plain function like those in `gradmem.cli.memory`."""

from __future__ import annotations

from ..model.packaged import HUB
from .console import console


def download(checkpoint: str, source: str = HUB) -> None:
    """Download a checkpoint that is not in the package; then it loads by its name, without a network.

    It is kept in the cache directory (GRADMEM_CACHE: another one), if its weights, settings and tokenizer are the
    published ones.

    Parameters
    ----------
    checkpoint
        Name of the checkpoint; gradmem list shows which can be downloaded.
    source
        Where it is: a repository on the Hugging Face hub, or a directory, as checkpoints/ in a clone of gradmem.
    """
    from ..model.download import download as fetch

    directory = fetch(checkpoint, source)
    console.print(f"{checkpoint}: {directory}", highlight=False, soft_wrap=True)
