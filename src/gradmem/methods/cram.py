"""Cramming: WRITE without any training, on a language model as it is (arXiv 2502.13063)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..backbone import Backbone
from ..batch import Tokens
from ..memory import Memory
from ..prefix import Prefix
from .base import Written
from .base.options import keywords_of
from .base.prefix_method import PrefixOptions
from .gradmem import GradMem


@dataclass(frozen=True, kw_only=True)
class CramOptions(PrefixOptions):
    """Options of `cram`."""

    n_mem: int = 16
    """Number of memory vectors, m."""
    write_steps: int = 1000
    """Default number of write steps; with `until`, the largest."""
    inner_lr: float = 1.0
    """Learning rate of Adam: several times the standard deviation of token embeddings, since layers begin with a
    norm."""
    start: Literal["random", "mean"] = "random"
    """Start of every memory: random vectors with the standard deviation of the token embeddings, or their mean."""
    seed: int = 0
    """Seed of the random vectors."""


class Cram(GradMem):
    """Memory vectors that many steps of Adam fit to one text, until a frozen language model reproduces it.

    This is GradMem without meta-training: nothing is trained, so a write takes hundreds of steps instead of a few. The
    same text always gives the same memory.

    Such a memory recites its text token by token (`restore`). The model has not learned to answer questions from it:
    an answer may have nothing to do with the text, and `generate` warns of this.

    Parameters
    ----------
    backbone : Backbone
        Any pretrained language model; its weights stay as they are.
    **options
        The fields of `CramOptions`.
    """

    caution = (
        "cram recites its text and does not answer questions about it: answers may be wrong; `gradmem restore` reads "
        "the text back"
    )
    joins = False  # A frozen model has not learned to read several memories together.

    @keywords_of(CramOptions)
    def __init__(self, backbone: Backbone, **options: Any) -> None:
        own = CramOptions(**options)
        with torch.random.fork_rng():
            torch.manual_seed(own.seed)
            super().__init__(
                backbone,
                n_mem=own.n_mem,
                write_steps=own.write_steps,
                inner_lr=own.inner_lr,
                extra_step_decay=0.0,
                inner_optimizer="adam",
                order="none",
                freeze_backbone=True,
            )
        self.initial_memory.requires_grad_(False)
        if own.start == "mean":
            self.initial_memory.copy_(backbone.model.get_input_embeddings().weight.detach().mean(0))

    @torch.no_grad()
    def trajectory(self, context: Tokens, steps: int, *, until: float | None = None) -> Iterator[Written]:
        """Yield the memory before the first write step and after every step; see `Method.trajectory`."""
        yield from super().trajectory(context, steps, until=until)

    def generate(
        self, memory: Memory | Prefix, queries: list[list[int]], *args: Any, **options: Any
    ) -> list[list[int]]:
        """Generate a continuation of each query, with a warning; see the class, and `Method.generate`."""
        warnings.warn(self.caution, stacklevel=2)
        return super().generate(memory, queries, *args, **options)
