"""GradMem: WRITE by gradient descent on prefix vectors (arXiv 2603.13875, section 3)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from ..backbone import Backbone
from ..batch import Tokens
from ..errors import GradmemError, require
from ..inner.compiled import Graphs
from ..inner.gauss_newton import Losses, Outputs, gauss_newton
from ..inner.meta_gradient import Order, descend, skip_finished
from ..inner.objective import joint_losses, sample_losses
from ..inner.optimizers import OPTIMIZERS, Rates, Tensors, heavy_ball
from ..memory import Memory
from ..prefix import Prefix
from .base import Mode, Written
from .base.chunked import ChunkedMethod
from .base.prefix_method import Head, Phase


class GradMem(ChunkedMethod):
    """Memory vectors that are written by K steps of gradient descent on the loss of reconstructing the context.

    Parameters
    ----------
    backbone : Backbone
    n_mem : int
        Memory vectors m.
    write_steps : int
        Default number of write steps K.
    inner_lr : float
        Inner learning rate, on the mean token loss.
    learn_inner_lr : bool
        Meta-learn one inner learning rate for each memory vector, starting from `inner_lr`.
    learn_momentum : bool
        Descend with momentum, and meta-learn it for each of the `write_steps`, starting from none, and the inner
        learning rates for each of them too. Needs `learn_inner_lr` and `inner_optimizer: sgd`.
    extra_step_decay : float
        How fast the inner learning rate falls beyond `write_steps`: the j-th step after them takes the rate divided by
        1 + extra_step_decay * j. With 0, the paper's constant rate, a memory overshoots after more steps than trained.
        Momentum falls likewise.
    gauss_newton_after : int, optional
        Take so many steps of this descent, and Gauss-Newton steps after them: each costs several times as much, and
        stores more, untrained (see `gradmem.inner.gauss_newton`). The meta-gradient takes them as constants.
    inner_optimizer : {"sgd", "adam"}
    clip_value, clip_norm : float, optional
        Clips of the inner gradient, per sample and tensor.
    order : {"second", "first", "none"}
        How the meta-gradient passes through the write steps.
    last_k : int, optional
        With "second": only the last k steps are of second order.
    n_ctrl : int
        Control vectors before and after the memory, own ones for WRITE and READ.
    projection : {"none", "proj", "per_sample"}
        Linear map of the memory before it enters the model: none, one shared, or one that each sample's WRITE
        updates along with its memory.
    write_head : {"none", "copy", "random"}
        Output layer of its own for WRITE, starting as a copy of the LM head or drawn independently.
    reconstruction : bool
        The write loss that training may add to that of READ is the one after the last step, at the cost of one more
        pass over the context; by default, as published, the one before it.
    write_lora, read_lora : int
        Rank of LoRA adapters that are active in WRITE only, and of others that are active in READ only; 0 for none.
    freeze_backbone : bool
        Train only what this method adds: memory and control vectors, projection, write head, inner learning rates and
        adapters.
    freeze_embeddings : bool
        Leave the token embeddings as they are, and the output layer where it shares their weights.
    chunk_size : int, optional
        Most tokens of a chunk of a longer context; by default every context is written whole.
    chunk_mode : {"sequential", "independent", "joint"}
        Write each chunk from the memory that the one before it left; each from M0 into vectors of its own, which READ
        sees together; or all into the same vectors, each step down the mean loss of all their tokens. Each takes all
        `write_steps`; `extra_step_decay` and `last_k` count those of a chunk.
    """

    modes = get_args(Mode)
    runtime_options = ("gauss_newton_after",)

    def __init__(
        self,
        backbone: Backbone,
        *,
        n_mem: int = 8,
        write_steps: int = 5,
        inner_lr: float = 1.0,
        learn_inner_lr: bool = False,
        learn_momentum: bool = False,
        extra_step_decay: float = 0.5,
        gauss_newton_after: int | None = None,
        inner_optimizer: Literal["sgd", "adam"] = "sgd",
        clip_value: float | None = None,
        clip_norm: float | None = None,
        order: Order = "second",
        last_k: int | None = None,
        n_ctrl: int = 0,
        projection: Literal["none", "proj", "per_sample"] = "none",
        write_head: Head = "none",
        reconstruction: bool = False,
        write_lora: int = 0,
        read_lora: int = 0,
        freeze_backbone: bool = False,
        freeze_embeddings: bool = False,
        chunk_size: int | None = None,
        chunk_mode: Mode = "sequential",
    ) -> None:
        super().__init__(backbone, n_mem, write_steps, n_ctrl, chunk_size, chunk_mode)
        require("inner_lr", inner_lr, inner_lr > 0, "positive")
        require("extra_step_decay", extra_step_decay, extra_step_decay >= 0, "at least 0")
        require("inner_optimizer", inner_optimizer, inner_optimizer in OPTIMIZERS, "sgd or adam")
        fits = not learn_momentum or (learn_inner_lr and inner_optimizer == "sgd" and write_steps > 0)
        require("learn_momentum", learn_momentum, fits, "used with learn_inner_lr, sgd and at least one write step")
        require("order", order, order in ("none", "first", "second"), "none, first or second")
        require("last_k", last_k, last_k is None or last_k >= 0, "at least 0")
        require("projection", projection, projection in ("none", "proj", "per_sample"), "none, proj or per_sample")
        require("clip_value", clip_value, clip_value is None or clip_value > 0, "positive")
        require("clip_norm", clip_norm, clip_norm is None or clip_norm > 0, "positive")
        require("write_lora", write_lora, write_lora >= 0, "at least 0")
        require("read_lora", read_lora, read_lora >= 0, "at least 0")
        self.inner_lr, self.extra_step_decay = inner_lr, extra_step_decay
        self.gauss_newton_after = gauss_newton_after
        self.update = OPTIMIZERS[inner_optimizer]
        self.clip_value, self.clip_norm = clip_value, clip_norm
        self.order: Order = order
        self.last_k = last_k
        self.projection, self.reconstruction = projection, reconstruction

        backbone.requires_grad_(not freeze_backbone)
        if freeze_embeddings:
            backbone.model.get_input_embeddings().requires_grad_(False)
        learned: dict[str, Any] = {"dtype": torch.float32, "device": self.initial_memory.device}
        rates = (write_steps, n_mem, 1) if learn_momentum else (n_mem, 1)
        self.log_inner_lr = nn.Parameter(torch.full(rates, math.log(inner_lr), **learned)) if learn_inner_lr else None
        self.momentum = nn.Parameter(torch.zeros(write_steps, **learned)) if learn_momentum else None
        self.proj = None if projection == "none" else self._new_projection(identity=True)
        self.write_head = self._new_write_head(write_head)
        ranks: dict[Phase, int] = {"write": write_lora, "read": read_lora}
        self.adapters = _add_lora(backbone, {phase: rank for phase, rank in ranks.items() if rank})
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
        """Write contexts into memories of their own, or into those of `rows`."""
        embeds = self._embed_context(context)
        training = torch.is_grad_enabled()
        descents = steps if self.gauss_newton_after is None else min(steps, self.gauss_newton_after)
        forward_context = self._forward_context(training and self.order == "second")

        def losses_of(tensors: Tensors, embeds: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
            with forward_context():
                return self._losses(tensors, Tokens(ids, mask), embeds)

        def loss(tensors: Tensors, embeds: Tensor, ids: Tensor, mask: Tensor, rows: Tensor | None = None) -> Tensor:
            if rows is None:
                return sample_losses(losses_of(tensors, embeds, ids, mask), mask)
            size = len(rows) if training else max(1, self.backbone.tokens_at_once // ids.shape[1])
            losses = _in_parts(losses_of, tensors, rows, (embeds, ids, mask), size)
            return joint_losses(losses, mask, rows, len(start["memory"]))

        walk = descend(
            loss if until is None or training or rows is not None else skip_finished(loss, until),
            start,
            self.update if self.momentum is None else heavy_ball(self._momentum),
            self._rates,
            descents,
            given=[embeds, context.ids, context.mask, *([] if rows is None else [rows])],
            order=self.order,
            last_k=self.last_k,
            strategy=self.strategy,
            graphs=self.graphs,
            more=more,
            clip_value=self.clip_value,
            clip_norm=self.clip_norm,
            until=until,
        )
        if descents < steps:
            parts = self._gauss_newton_parts(context, rows, embeds, len(start["memory"]))
            walk = gauss_newton(walk, parts, steps - descents, until)
        for step in walk:
            losses = torch.stack(step.losses) if step.losses else embeds.new_zeros(0, len(start["memory"]))
            yield Written(Memory(step.tensors), losses, step.taken)

    def _gauss_newton_parts(
        self, context: Tokens, rows: Tensor | None, embeds: Tensor, batch: int
    ) -> list[tuple[Outputs, Losses]]:
        """The write loss, of some contexts or chunks at a time, as `gauss_newton` takes it."""
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

        size = max(1, self.backbone.tokens_at_once // context.ids.shape[1])
        return [part(slice(i, i + size)) for i in range(0, len(rows), size)]

    def _forward_context(self, second: bool) -> Callable[[], AbstractContextManager[None]]:
        """How the backbone is to compute the write loss, whose gradient is of second order or not."""
        if not second:
            return self.backbone.training_attention
        return self.backbone.eager_attention if self.strategy == "compile" else self.backbone.double_backward

    def reconstruct(self, memory: Memory, lengths: Sequence[int]) -> list[list[int]]:
        """Read contexts back with the adapters of WRITE; see `Method.reconstruct`."""
        with self._writing():
            return super().reconstruct(memory, lengths)

    def prefix(self, memory: Memory) -> Prefix:
        """Run what READ puts before a query; where it has adapters, they stay active for what follows the prefix."""
        with _active(self.adapters, "read"):
            prefix = super().prefix(memory)
        return _AdaptedPrefix(prefix, self.adapters) if self.adapters else prefix

    @property
    def gauss_newton_after(self) -> int | None:
        """Write steps that Gauss-Newton steps follow; None where none do."""
        return self._gauss_newton_after

    @gauss_newton_after.setter
    def gauss_newton_after(self, steps: int | None) -> None:
        good = steps is None or (isinstance(steps, int) and steps >= 0)
        require("gauss_newton_after", steps, good, "a number of write steps, or none")
        self._gauss_newton_after = steps

    def inner_lrs(self) -> list[float]:
        """Inner learning rate of each memory vector, or the one that all share; with momentum step after step."""
        return [self.inner_lr] if self.log_inner_lr is None else self.log_inner_lr.exp().flatten().tolist()

    def inner_parameters(self) -> list[nn.Parameter]:
        """Learned inner learning rates and momentum; see `Method.inner_parameters`."""
        return [parameter for parameter in (self.log_inner_lr, self.momentum) if parameter is not None]

    def _start(self, batch: int) -> Tensors:
        tensors = super()._start(batch)
        if self.projection == "per_sample" and self.proj is not None:
            tensors["proj_weight"] = self.proj.weight.expand(batch, -1, -1)
            tensors["proj_bias"] = self.proj.bias.expand(batch, -1)
        return tensors

    def _settling(self, step: int) -> float:
        return 1 / (1 + self.extra_step_decay * max(0, step + 1 - self.write_steps))

    def _rates(self, step: int) -> Rates:
        factor, rate = self._settling(step), self.inner_lr
        rates: dict[str, float | Tensor] = dict.fromkeys(("memory", "proj_weight", "proj_bias"), rate * factor)
        if self.log_inner_lr is not None:
            log_rate = self.log_inner_lr if self.momentum is None else self._at(self.log_inner_lr, step)
            rates["memory"] = log_rate.exp().to(self.initial_memory.dtype) * factor
        return rates

    def _momentum(self, step: int) -> Tensor:
        assert self.momentum is not None
        return self._at(self.momentum, step) * self._settling(step)

    def _at(self, learned: Tensor, step: int) -> Tensor:
        """What was learned for a step; that of the last one for those beyond."""
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
        """The model as WRITE runs it: without dropout, with its own adapters."""
        with self.backbone.without_dropout(), _active(self.adapters, "write"):
            yield


def _in_parts(
    losses: Callable[..., Tensor], tensors: Tensors, rows: Tensor, given: Sequence[Tensor], size: int
) -> Tensor:
    """Losses of chunks under the memories of their rows, of so many at once: only one part's graph is ever kept."""

    def part(rows: Tensor, *given: Tensor) -> Tensor:
        return losses({name: tensor[rows] for name, tensor in tensors.items()}, *given)

    if len(rows) <= size:
        return part(rows, *given)
    parts = zip(*(tensor.split(size) for tensor in (rows, *given)), strict=True)
    return torch.cat([checkpoint(part, *some, use_reentrant=False) for some in parts])


class _AdaptedPrefix(Prefix):
    """A prefix that the adapters of READ have run, and run on from."""

    def __init__(self, plain: Prefix, adapters: list[Any]) -> None:
        super().__init__(plain.last, plain.cache, plain.mask, plain.start)
        self.adapters = adapters

    def select(self, rows: Tensor) -> Prefix:
        """Rows of the prefix, in any order and any number of times; the original stays as it is."""
        return _AdaptedPrefix(super().select(rows), self.adapters)

    def join(self, others: Sequence[Prefix]) -> Prefix:
        """Rows of this prefix and of others; see `Prefix.join`."""
        return _AdaptedPrefix(super().join(others), self.adapters)

    def active(self) -> AbstractContextManager[Any]:
        """Context in which the adapters of READ are active."""
        return _active(self.adapters, "read")


def _add_lora(backbone: Backbone, ranks: dict[Phase, int]) -> list[Any]:
    """Put LoRA adapters for some phases on all linear layers of the blocks, switched off; return the adapted layers."""
    if not ranks:
        return []
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise GradmemError("write_lora and read_lora need peft: pip install 'gradmem[train]'") from error
    transposed = any(isinstance(module, Conv1D) for module in backbone.modules())
    trainable = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    for phase, rank in ranks.items():
        config = LoraConfig(
            r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM", fan_in_fan_out=transposed
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # two sets of adapters are meant
            inject_adapter_in_model(config, backbone.model, adapter_name=phase)
    layers = [module for module in backbone.modules() if isinstance(module, BaseTunerLayer)]
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_("lora_" in name or name.replace(".base_layer", "") in trainable)
    _switch(layers, None)
    return layers


def _switch(layers: list[Any], phase: Phase | None) -> None:
    # peft's layers. Not set_adapter(), which also clears requires_grad of the other adapters' weights.
    for layer in layers:
        layer._active_adapter = [phase] if phase in layer.lora_A else []


@contextmanager
def _active(layers: list[Any], phase: Phase) -> Iterator[None]:
    """Let the adapters of a phase act, where it has any, and none afterwards."""
    _switch(layers, phase)
    try:
        yield
    finally:
        _switch(layers, None)
