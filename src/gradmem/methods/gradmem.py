"""GradMem: WRITE by gradient descent on prefix vectors (arXiv 2603.13875, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..backbone import Backbone
from ..batch import Tokens
from ..errors import require
from ..inner.gauss_newton import Losses, Outputs, gauss_newton
from ..inner.meta_gradient import Step, skip_finished
from ..inner.objective import chunk_divisors, joint_losses, sample_losses
from ..inner.optimizers import Tensors
from ..memory import Memory
from ..prefix import Prefix
from .base import Method, Written
from .base.adapters import AdaptedPrefix, active_adapters, add_lora
from .base.chunked import ChunkedMethod
from .base.chunks import ChunkMode
from .base.energy import Energy
from .base.gradmem_options import GradMemOptions
from .base.inner_loop import InnerLoop
from .base.options import keywords_of
from .base.pooled_gradmem import PooledGradMem
from .base.prefix_method import Phase
from .base.started_gradmem import StartedGradMem

VARIANTS: dict[str, type[Method]] = {"pooled": PooledGradMem, "select": StartedGradMem, "match": StartedGradMem}
"""Classes that serve a start that is made from the context."""


class GradMem(InnerLoop, ChunkedMethod):
    """A memory that is written by K steps of gradient descent on the loss of reconstructing the context.

    It is vectors, as in the paper, or has another form: slots of keys and values (`KeysValues`), or a change of the
    model's weights (`LowRank`). Its start is learned. With a start that is made from the context, `variant` says which
    class it is.

    Parameters
    ----------
    backbone : Backbone
    **options
        The fields of `GradMemOptions`.
    """

    modes = get_args(ChunkMode)
    runtime_options = ("gauss_newton_after",)

    @classmethod
    def variant(cls, options: dict[str, Any]) -> type[Method]:
        """With a start that is made from the context, the class that makes it; see `Method.variant`."""
        return VARIANTS.get(str(options.get("start")), cls)

    @keywords_of(GradMemOptions)
    def __init__(self, backbone: Backbone, **options: Any) -> None:
        own = GradMemOptions(**options)
        require("start", own.start, own.start == "learned", "learned in this class: see `GradMem.variant`")
        super().__init__(backbone, own, own.new_form(backbone))
        self._prepare_descent(own, (self.n_mem, 1) if self.form is None else self.form.rate_shapes())
        projects = own.projection != "none" and self.form is None
        self.proj = self._new_projection(identity=True) if projects else None
        self.write_head = self._new_write_head(own.write_head)
        self.energy = Energy(backbone) if own.write_objective == "energy" else None
        ranks: dict[Phase, int] = {"write": own.write_lora, "read": own.read_lora}
        self.adapters = add_lora(backbone, {phase: rank for phase, rank in ranks.items() if rank})

    def trajectory_from(
        self, context: Tokens, start: Tensors, steps: int, until: float | None, more: bool = False
    ) -> Iterator[Written]:
        """Yield the memory before the first write step and after every step; see `ChunkedMethod.trajectory_from`."""
        yield from self._descend(context, None, start, steps, until, more)

    def joint_trajectory(
        self, chunks: Tokens, rows: Tensor, start: Tensors, steps: int, until: float | None
    ) -> Iterator[Written]:
        """Descend the loss of all chunks of a memory; see `ChunkedMethod.joint_trajectory`."""
        yield from self._descend(chunks, rows, start, steps, until)

    def _descend(
        self,
        context: Tokens,
        rows: Tensor | None,
        start: Tensors,
        steps: int,
        until: float | None,
        more: bool = False,
    ) -> Iterator[Written]:
        """Write each context into a memory of its own, or into the memory that `rows` names."""
        context = Tokens(context.ids, self._targets(context.mask))
        embeds = self._embed_context(context) if self.energy is None else self.backbone.embed(context.ids)
        training, batch = torch.is_grad_enabled(), len(next(iter(start.values())))
        descents = steps if self.gauss_newton_after is None else min(steps, self.gauss_newton_after)
        forward_context = self._forward_context()

        def losses_of(tensors: Tensors, embeds: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
            with forward_context():
                return self._write_losses(tensors, Tokens(ids, mask), embeds)

        def loss(tensors: Tensors, embeds: Tensor, ids: Tensor, mask: Tensor, *chunks: Tensor) -> Tensor:
            if not chunks:
                return sample_losses(losses_of(tensors, embeds, ids, mask), mask)
            rows, divisors = chunks
            size = len(rows) if training else self.backbone.contexts_at_once(ids.shape[1])
            losses = _in_parts(losses_of, tensors, rows, (embeds, ids, mask), size)
            return joint_losses(losses, divisors, rows, batch)

        chunks = [] if rows is None else [rows, self._divisors(context, rows, batch)]
        states: Iterator[Step] = self._states(
            loss if until is None or training or rows is not None else skip_finished(loss, until),
            start,
            descents,
            [embeds, context.ids, context.mask, *chunks],
            until,
            more,
        )
        if descents < steps:
            second = training and self._order == "second"
            parts = self._gauss_newton_parts(context, rows, embeds, batch, second)
            states = gauss_newton(states, parts, steps - descents, until, second)
        for step in states:
            losses = torch.stack(step.losses) if step.losses else embeds.new_zeros(0, batch)
            yield Written(Memory(step.tensors), losses, step.taken)

    def _gauss_newton_parts(
        self, context: Tokens, rows: Tensor | None, embeds: Tensor, batch: int, second: bool
    ) -> list[tuple[Outputs, Losses]]:
        """Split the write loss into parts of some contexts or chunks each, as `gauss_newton` takes them."""
        differentiable = self.backbone.triple_backward if second else self.backbone.double_backward
        rows = torch.arange(batch, device=embeds.device) if rows is None else rows
        divisors = self._divisors(context, rows, batch)

        def part(some: slice) -> tuple[Outputs, Losses]:
            def outputs(tensors: Tensors) -> Tensor:
                own = {name: tensor[rows[some]] for name, tensor in tensors.items()}
                with differentiable(), self._writing():
                    return self._hidden(own, embeds[some])

            def losses(hidden: Tensor) -> Tensor:
                return joint_losses(self._losses_of(hidden, context[some]), divisors[some], rows[some], batch)

            return outputs, losses

        size = self.backbone.contexts_at_once(context.ids.shape[1])
        return [part(slice(i, i + size)) for i in range(0, len(rows), size)]

    def _divisors(self, context: Tokens, rows: Tensor, batch: int) -> Tensor:
        return chunk_divisors(context.mask, rows, batch, alike=self.chunk_mode == "parallel")

    def reconstruct(self, memory: Memory, lengths: Sequence[int]) -> list[list[int]]:
        """Reconstruct contexts with the adapters of WRITE; see `Method.reconstruct`."""
        with self._writing():
            return super().reconstruct(memory, lengths)

    def prefix(self, memory: Memory) -> Prefix:
        """Run what READ places before a query; its adapters, if any, are also active for what follows."""
        with active_adapters(self.adapters, "read"):
            prefix = super().prefix(memory)
        return AdaptedPrefix(prefix, self.adapters) if self.adapters else prefix

    @property
    def gauss_newton_after(self) -> int | None:
        """Steps of descent before Gauss-Newton steps; None if there are no Gauss-Newton steps."""
        return self.options.gauss_newton_after

    @gauss_newton_after.setter
    def gauss_newton_after(self, steps: int | None) -> None:
        self.options = replace(self.options, gauss_newton_after=steps)

    def _start(self, batch: int) -> Tensors:
        tensors = super()._start(batch)
        if self.options.projection == "per_sample" and self.proj is not None:
            tensors["proj_weight"] = self.proj.weight.expand(batch, -1, -1)
            tensors["proj_bias"] = self.proj.bias.expand(batch, -1)
        return tensors

    def _project(self, phase: Phase, tensors: Tensors) -> Tensor:
        memory = tensors["memory"].to(self.initial_memory.dtype)
        if "proj_weight" in tensors:
            return torch.baddbmm(tensors["proj_bias"][:, None], memory, tensors["proj_weight"].transpose(1, 2))
        return memory if self.proj is None else self.proj(memory)

    def _targets(self, mask: Tensor) -> Tensor:
        """Where WRITE has a loss: at all tokens, or without the first one if nothing predicts it."""
        if self.predicts_first or self.energy is not None:
            return mask
        return torch.cat([torch.zeros_like(mask[:, :1]), mask[:, 1:]], dim=1)

    def _losses(self, tensors: Tensors, context: Tokens, embeds: Tensor) -> Tensor:
        with self._writing():
            return super()._losses(tensors, context, embeds)

    def _write_losses(self, tensors: Tensors, context: Tokens, embeds: Tensor) -> Tensor:
        """Compute what WRITE descends, for each context token: shape (batch, length), zero at pads."""
        if self.energy is None:
            return self._losses(tensors, context, embeds)
        with self._writing():
            energies: Tensor = self.energy(self._hidden(tensors, embeds)[:, 1:]) * context.mask
        return energies

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Run the model as WRITE does: without dropout and with the adapters of WRITE."""
        with self.backbone.without_dropout(), active_adapters(self.adapters, "write"):
            yield


def _in_parts(
    losses: Callable[..., Tensor], tensors: Tensors, rows: Tensor, given: Sequence[Tensor], size: int
) -> Tensor:
    """Compute losses of chunks given the memories of their rows, `size` chunks at a time; one graph is kept at once."""

    def part(rows: Tensor, *given: Tensor) -> Tensor:
        return losses({name: tensor[rows] for name, tensor in tensors.items()}, *given)

    if len(rows) <= size:
        return part(rows, *given)
    parts = zip(*(tensor.split(size) for tensor in (rows, *given)), strict=True)
    return torch.cat([checkpoint(part, *some, use_reentrant=False) for some in parts])
