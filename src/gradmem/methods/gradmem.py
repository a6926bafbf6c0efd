"""GradMem: WRITE by gradient descent on prefix vectors (arXiv 2603.13875, section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..backbone import Backbone
from ..batch import Tokens
from ..errors import require
from ..inner.compiled import Graphs
from ..inner.gauss_newton import Losses, Outputs, gauss_newton
from ..inner.meta_gradient import Order, descend, skip_finished
from ..inner.objective import joint_losses, sample_losses
from ..inner.optimizers import OPTIMIZERS, Rates, Tensors, heavy_ball
from ..memory import Memory
from ..prefix import Prefix
from .base import Written
from .base.adapters import AdaptedPrefix, active_adapters, add_lora
from .base.chunked import ChunkedMethod, ChunkedOptions
from .base.chunks import ChunkMode
from .base.options import keywords_of
from .base.prefix_method import Phase


@dataclass(frozen=True, kw_only=True)
class GradMemOptions(ChunkedOptions):
    """Options of `gradmem`."""

    write_steps: int = 5
    """Default number of write steps K, taken on each chunk."""
    inner_lr: float = 1.0
    """Inner learning rate, on the mean token loss."""
    learn_inner_lr: bool = False
    """Meta-learn one inner learning rate for each memory vector, starting from `inner_lr`."""
    learn_momentum: bool = False
    """Descend with momentum. Momentum and inner learning rates are meta-learned for each of the `write_steps`; momentum
    starts from zero. Needs `learn_inner_lr` and `inner_optimizer: sgd`."""
    extra_step_decay: float = 0.5
    """How fast the inner learning rate and momentum fall after `write_steps`: the j-th further step on a chunk divides
    them by 1 + extra_step_decay * j. With 0, the constant rate of the paper, further steps overshoot."""
    gauss_newton_after: int | None = None
    """Take Gauss-Newton steps after so many steps of descent. Each costs several times as much and stores more, without
    training (see `gradmem.inner.gauss_newton`). The meta-gradient treats them as constants."""
    inner_optimizer: Literal["sgd", "adam"] = "sgd"
    """Update rule of the write steps."""
    clip_value: float | None = None
    """Largest absolute value of an element of the inner gradient. No recipe uses it; the published code has it."""
    clip_norm: float | None = None
    """Largest norm of the inner gradient of a sample and a tensor. No recipe uses it; the published code has it."""
    order: Order = "second"
    """How the meta-gradient passes through the write steps: second differentiates the inner gradients, first treats
    them as constants, none stops at each step."""
    last_k: int | None = None
    """With `order: second`: only the last k steps on a chunk are of second order, the earlier ones of first order. No
    recipe uses it; the published code has it."""
    projection: Literal["none", "proj", "per_sample"] = "none"
    """Linear map of the memory before it enters the model: none; proj, one that all samples share; or per_sample, one
    that WRITE updates for each sample along with its memory. No recipe uses per_sample; the published code has it."""
    reconstruction: bool = False
    """Train on the write loss after the last step, which takes one more pass over the context. By default, as
    published, it is the loss before the last step."""
    write_lora: int = 0
    """Rank of LoRA adapters that are active in WRITE only; 0 for none."""
    read_lora: int = 0
    """Rank of LoRA adapters that are active in READ only; 0 for none."""
    freeze_backbone: bool = False
    """Train only what this method adds: memory and control vectors, projection, write head, inner learning rates,
    momentum and adapters."""
    freeze_embeddings: bool = False
    """Do not train the token embeddings, nor an output layer that shares their weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("inner_lr", "clip_value", "clip_norm"):
            value = getattr(self, name)
            require(name, value, value is None or value > 0, "positive")
        for name in ("extra_step_decay", "gauss_newton_after", "last_k", "write_lora", "read_lora"):
            value = getattr(self, name)
            require(name, value, value is None or value >= 0, "at least 0")
        fits = self.learn_inner_lr and self.inner_optimizer == "sgd" and self.write_steps > 0
        wanted = "used with learn_inner_lr, sgd and at least one write step"
        require("learn_momentum", self.learn_momentum, fits or not self.learn_momentum, wanted)


class GradMem(ChunkedMethod):
    """Memory vectors that are written by K steps of gradient descent on the loss of reconstructing the context.

    Parameters
    ----------
    backbone : Backbone
    **options
        The fields of `GradMemOptions`.
    """

    modes = get_args(ChunkMode)
    runtime_options = ("gauss_newton_after",)

    @keywords_of(GradMemOptions)
    def __init__(self, backbone: Backbone, **options: Any) -> None:
        own = GradMemOptions(**options)
        super().__init__(backbone, own)
        self.options = own
        self.reconstruction = own.reconstruction
        self.update = OPTIMIZERS[own.inner_optimizer]
        backbone.requires_grad_(not own.freeze_backbone)
        if own.freeze_embeddings:
            backbone.model.get_input_embeddings().requires_grad_(False)
        learned: dict[str, Any] = {"dtype": torch.float32, "device": self.initial_memory.device}
        shape = (own.write_steps, own.n_mem, 1) if own.learn_momentum else (own.n_mem, 1)
        log_rate = torch.full(shape, math.log(own.inner_lr), **learned)
        self.log_inner_lr = nn.Parameter(log_rate) if own.learn_inner_lr else None
        self.momentum = nn.Parameter(torch.zeros(own.write_steps, **learned)) if own.learn_momentum else None
        self.proj = None if own.projection == "none" else self._new_projection(identity=True)
        self.write_head = self._new_write_head(own.write_head)
        ranks: dict[Phase, int] = {"write": own.write_lora, "read": own.read_lora}
        self.adapters = add_lora(backbone, {phase: rank for phase, rank in ranks.items() if rank})
        self.graphs: Graphs = {}

    def trajectory_from(
        self, context: Tokens, start: Tensors, steps: int, until: float | None, more: bool = False
    ) -> Iterator[Written]:
        """Yield the memory before the first write step and after every step; see `ChunkedMethod.trajectory_from`."""
        yield from self._descend(context, None, start, steps, until, more)

    def joint_trajectory(
        self, chunks: Tokens, rows: Tensor, start: Tensors, steps: int, until: float | None
    ) -> Iterator[Written]:
        """Descend the mean loss of all chunks of a memory; see `ChunkedMethod.joint_trajectory`."""
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
        embeds = self._embed_context(context)
        training = torch.is_grad_enabled()
        descents = steps if self.gauss_newton_after is None else min(steps, self.gauss_newton_after)
        forward_context = self._forward_context(training and self.options.order == "second")

        def losses_of(tensors: Tensors, embeds: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
            with forward_context():
                return self._losses(tensors, Tokens(ids, mask), embeds)

        def loss(tensors: Tensors, embeds: Tensor, ids: Tensor, mask: Tensor, rows: Tensor | None = None) -> Tensor:
            if rows is None:
                return sample_losses(losses_of(tensors, embeds, ids, mask), mask)
            size = len(rows) if training else self.backbone.contexts_at_once(ids.shape[1])
            losses = _in_parts(losses_of, tensors, rows, (embeds, ids, mask), size)
            return joint_losses(losses, mask, rows, len(start["memory"]))

        states = descend(
            loss if until is None or training or rows is not None else skip_finished(loss, until),
            start,
            self.update if self.momentum is None else heavy_ball(self._momentum),
            self._rates,
            descents,
            given=[embeds, context.ids, context.mask, *([] if rows is None else [rows])],
            order=self.options.order,
            last_k=self.options.last_k,
            strategy=self.strategy,
            graphs=self.graphs,
            more=more,
            clip_value=self.options.clip_value,
            clip_norm=self.options.clip_norm,
            until=until,
        )
        if descents < steps:
            parts = self._gauss_newton_parts(context, rows, embeds, len(start["memory"]))
            states = gauss_newton(states, parts, steps - descents, until)
        for step in states:
            losses = torch.stack(step.losses) if step.losses else embeds.new_zeros(0, len(start["memory"]))
            yield Written(Memory(step.tensors), losses, step.taken)

    def _gauss_newton_parts(
        self, context: Tokens, rows: Tensor | None, embeds: Tensor, batch: int
    ) -> list[tuple[Outputs, Losses]]:
        """Split the write loss into parts of some contexts or chunks each, as `gauss_newton` takes them."""
        rows = torch.arange(batch, device=embeds.device) if rows is None else rows
        tokens = rows.new_zeros(batch).index_add(0, rows, context.lengths)

        def part(some: slice) -> tuple[Outputs, Losses]:
            def outputs(tensors: Tensors) -> Tensor:
                own = {name: tensor[rows[some]] for name, tensor in tensors.items()}
                with self.backbone.double_backward(), self._writing():
                    return self._hidden(own, embeds[some])

            def losses(hidden: Tensor) -> Tensor:
                shares = self._losses_of(hidden, context[some]).sum(1) / tokens[rows[some]]
                return shares.new_zeros(batch).index_add(0, rows[some], shares)

            return outputs, losses

        size = self.backbone.contexts_at_once(context.ids.shape[1])
        return [part(slice(i, i + size)) for i in range(0, len(rows), size)]

    def _forward_context(self, second: bool) -> Callable[[], AbstractContextManager[None]]:
        """Choose how the backbone computes the write loss, by whether its gradient is differentiated again."""
        if not second:
            return self.backbone.training_attention
        return self.backbone.eager_attention if self.strategy == "compile" else self.backbone.double_backward

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

    def inner_lrs(self) -> list[float]:
        """Return the inner learning rate of each memory vector, or the shared one; with momentum, for each step."""
        return [self.options.inner_lr] if self.log_inner_lr is None else self.log_inner_lr.exp().flatten().tolist()

    def inner_parameters(self) -> list[nn.Parameter]:
        """Return the learned inner learning rates and momentum; see `Method.inner_parameters`."""
        return [parameter for parameter in (self.log_inner_lr, self.momentum) if parameter is not None]

    def _start(self, batch: int) -> Tensors:
        tensors = super()._start(batch)
        if self.options.projection == "per_sample" and self.proj is not None:
            tensors["proj_weight"] = self.proj.weight.expand(batch, -1, -1)
            tensors["proj_bias"] = self.proj.bias.expand(batch, -1)
        return tensors

    def _step_decay(self, step: int) -> float:
        return 1 / (1 + self.options.extra_step_decay * max(0, step + 1 - self.write_steps))

    def _rates(self, step: int) -> Rates:
        factor, rate = self._step_decay(step), self.options.inner_lr
        rates: dict[str, float | Tensor] = dict.fromkeys(("memory", "proj_weight", "proj_bias"), rate * factor)
        if self.log_inner_lr is not None:
            log_rate = self.log_inner_lr if self.momentum is None else self._at(self.log_inner_lr, step)
            rates["memory"] = log_rate.exp().to(self.initial_memory.dtype) * factor
        return rates

    def _momentum(self, step: int) -> Tensor:
        assert self.momentum is not None
        return self._at(self.momentum, step) * self._step_decay(step)

    def _at(self, learned: Tensor, step: int) -> Tensor:
        """Return what was learned for a step, or for the last step if there are further ones."""
        return learned[min(step, len(learned) - 1)]

    def _project(self, phase: Phase, tensors: Tensors) -> Tensor:
        memory = tensors["memory"].to(self.initial_memory.dtype)
        if "proj_weight" in tensors:
            return torch.baddbmm(tensors["proj_bias"][:, None], memory, tensors["proj_weight"].transpose(1, 2))
        return memory if self.proj is None else self.proj(memory)

    def _losses(self, tensors: Tensors, context: Tokens, embeds: Tensor) -> Tensor:
        with self._writing():
            return super()._losses(tensors, context, embeds)

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
