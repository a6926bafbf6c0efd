"""Cramming: WRITE without any training, on a language model as it is (arXiv 2502.13063)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from ..backbone import Backbone
from ..batch import Tokens
from ..errors import require
from ..memory import Memory
from ..prefix import Prefix
from .base import Written
from .gradmem import GradMem


class Cram(GradMem):
    """Memory vectors that many steps of Adam fit to one text, until a frozen language model reproduces it.

    GradMem without meta-training: nothing here is trained, so hundreds of steps do what a few do there. The same text
    always gives the same memory.

    It is for reciting: the model gives the text back, token by token (`restore`). It has not learned to answer
    questions from such a memory: what it says to one may have nothing to do with the text, and `generate` warns.

    Parameters
    ----------
    backbone : Backbone
        Any pretrained language model; its weights stay as they are.
    n_mem : int
        Memory vectors m.
    write_steps : int
        Default number of write steps; with `until`, the most.
    inner_lr : float
        Learning rate of Adam: several times the width of token embeddings, since layers begin with a norm.
    start : {"random", "mean"}
        Where every memory starts: at vectors drawn as wide as the token embeddings, or at the mean token embedding.
    seed : int
        Seed of the drawn vectors.
    """

    caution = (
        "cram recites its text and does not answer questions about it: answers may be wrong; `gradmem restore` reads "
        "the text back"
    )
    joins = False  # a frozen model has not learned to read several memories together

    def __init__(
        self,
        backbone: Backbone,
        *,
        n_mem: int = 16,
        write_steps: int = 1000,
        inner_lr: float = 1.0,
        start: Literal["random", "mean"] = "random",
        seed: int = 0,
    ) -> None:
        require("start", start, start in ("random", "mean"), "random or mean")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            super().__init__(
                backbone,
                n_mem=n_mem,
                write_steps=write_steps,
                inner_lr=inner_lr,
                extra_step_decay=0.0,
                inner_optimizer="adam",
                order="none",
                freeze_backbone=True,
            )
        self.initial_memory.requires_grad_(False)
        if start == "mean":
            self.initial_memory.copy_(backbone.model.get_input_embeddings().weight.detach().mean(0))

    @torch.no_grad()
    def trajectory(self, context: Tokens, steps: int, *, until: float | None = None) -> Iterator[Written]:
        """Yield the memory before the first write step and after every step; see `Method.trajectory`."""
        yield from super().trajectory(context, steps, until=until)

    def generate(
        self,
        memory: Memory | Prefix,
        queries: list[list[int]],
        rows: Tensor | None = None,
        *,
        pad_id: int = 0,
        **options: Any,
    ) -> list[list[int]]:
        """Continue each query, with a warning: see the class, and `Method.generate`."""
        warnings.warn(self.caution, stacklevel=2)
        return super().generate(memory, queries, rows, pad_id=pad_id, **options)
