"""GradMem: WRITE by gradient descent on prefix vectors (arXiv 2603.13875, section 3)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..backbone import Backbone, Prefix
from ..batch import Tokens
from ..errors import GradmemError
from ..inner.meta_gradient import Order, descend
from ..inner.objective import sample_losses, token_losses
from ..inner.optimizers import OPTIMIZERS, Rates, Tensors
from ..memory import Memory
from .base import Method, Written


class GradMem(Method):
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
    write_lora : int
        Rank of LoRA adapters that are active in WRITE only; 0 for none.
    freeze_backbone : bool
        Train only what this method adds.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        n_mem: int = 8,
        write_steps: int = 5,
        inner_lr: float = 1.0,
        learn_inner_lr: bool = False,
        inner_optimizer: Literal["sgd", "adam"] = "sgd",
        clip_value: float | None = None,
        clip_norm: float | None = None,
        order: Order = "second",
        last_k: int | None = None,
        n_ctrl: int = 0,
        projection: Literal["none", "proj", "per_sample"] = "none",
        write_head: Literal["none", "copy", "random"] = "none",
        write_lora: int = 0,
        freeze_backbone: bool = False,
    ) -> None:
        super().__init__(backbone)
        _check("n_mem", n_mem, n_mem >= 1, "at least 1")
        _check("write_steps", write_steps, write_steps >= 0, "at least 0")
        _check("inner_lr", inner_lr, inner_lr > 0, "positive")
        _check("inner_optimizer", inner_optimizer, inner_optimizer in OPTIMIZERS, "sgd or adam")
        _check("order", order, order in ("none", "first", "second"), "none, first or second")
        _check("last_k", last_k, last_k is None or last_k >= 0, "at least 0")
        _check("n_ctrl", n_ctrl, n_ctrl >= 0, "at least 0")
        _check("projection", projection, projection in ("none", "proj", "per_sample"), "none, proj or per_sample")
        _check("write_head", write_head, write_head in ("none", "copy", "random"), "none, copy or random")
        _check("clip_value", clip_value, clip_value is None or clip_value > 0, "positive")
        _check("clip_norm", clip_norm, clip_norm is None or clip_norm > 0, "positive")
        _check("write_lora", write_lora, write_lora >= 0, "at least 0")
        self.write_steps = write_steps
        self.inner_lr = inner_lr
        self.update = OPTIMIZERS[inner_optimizer]
        self.clip_value, self.clip_norm = clip_value, clip_norm
        self.order: Order = order
        self.last_k = last_k
        self.projection = projection

        backbone.requires_grad_(not freeze_backbone)
        d = backbone.width
        like = backbone.model.get_input_embeddings().weight
        std = float(like.detach().float().std())

        def vectors(count: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(count, d, dtype=like.dtype, device=like.device) * std)

        self.initial_memory = vectors(n_mem)
        self.control = nn.ParameterDict(
            {name: vectors(n_ctrl) for name in ("write_start", "write_end", "read_start", "read_end")} if n_ctrl else {}
        )
        self.log_inner_lr = (
            nn.Parameter(torch.full((n_mem, 1), math.log(inner_lr), dtype=torch.float32, device=like.device))
            if learn_inner_lr
            else None
        )
        self.proj: nn.Linear | None = None
        if projection != "none":
            self.proj = nn.Linear(d, d, dtype=like.dtype, device=like.device)
            nn.init.eye_(self.proj.weight)
            nn.init.zeros_(self.proj.bias)
        self.write_head: nn.Linear | None = None
        if write_head != "none":
            vocabulary = backbone.head.weight.shape[0]
            self.write_head = nn.Linear(d, vocabulary, bias=False, dtype=like.dtype, device=like.device)
            if write_head == "copy":
                self.write_head.weight = nn.Parameter(backbone.head.weight.detach().clone())
            else:
                nn.init.normal_(self.write_head.weight, std=std)
        self.adapters = _add_lora(backbone, write_lora) if write_lora else []

    @property
    def n_mem(self) -> int:
        """Number of memory vectors."""
        return self.initial_memory.shape[0]

    @property
    def prefix_length(self) -> int:
        """Positions before the first context token: memory and control vectors."""
        return self.n_mem + sum(len(v) for name, v in self.control.items() if name.startswith("write"))

    @property
    def max_context(self) -> int:
        """Longest context in tokens: what the backbone's positions leave beside the prefix."""
        return self.backbone.max_positions - self.prefix_length

    def trajectory(self, context: Tokens, steps: int, *, until: float | None = None) -> Iterator[Written]:
        """Yield the memory before the first write step and after every step; see `Method.trajectory`."""
        if steps < 0:
            raise GradmemError(f"write steps must be at least 0, not {steps}")
        if context.ids.shape[1] > self.max_context:
            raise GradmemError(f"a context has {context.ids.shape[1]} tokens; the limit is {self.max_context}")
        if not context.mask[:, :1].all() or not context.mask.numel():
            raise GradmemError("a context is empty")
        embeds = self._embed_context(context)
        second = torch.is_grad_enabled() and self.order == "second"

        def loss(tensors: Tensors, embeds: Tensor) -> Tensor:
            with self.backbone.second_order() if second else nullcontext():
                return sample_losses(self._losses(tensors, context, embeds), context.mask)

        walk = descend(
            loss,
            self._start(len(context)),
            self.update,
            self._rates(),
            steps,
            given=[embeds],
            order=self.order,
            last_k=self.last_k,
            strategy=self.strategy,
            clip_value=self.clip_value,
            clip_norm=self.clip_norm,
            until=until,
        )
        for step in walk:
            losses = torch.stack(step.losses) if step.losses else embeds.new_zeros(0, len(context))
            yield Written(Memory(step.tensors), losses, step.taken)

    def token_losses(self, memory: Memory, context: Tokens) -> Tensor:
        """Loss of each context token under a memory, shape (batch, length), nats."""
        return self._losses(memory.tensors, context, self._embed_context(context))

    def inner_lrs(self) -> list[float]:
        """Inner learning rate of each memory vector, or the one that all share."""
        rate = self._rates()["memory"]
        return rate.flatten().tolist() if isinstance(rate, Tensor) else [rate]

    def check(self, memory: Memory, what: str) -> None:
        """Raise `GradmemError` unless the memory has the tensors and shapes that this method writes."""
        wanted = {name: tuple(tensor.shape[1:]) for name, tensor in self._start(1).items()}
        found = {name: tuple(tensor.shape[1:]) for name, tensor in memory.tensors.items()}
        if wanted != found:
            raise GradmemError(f"{what} holds {found}, this method writes {wanted}")

    def prefix(self, memory: Memory) -> Prefix:
        """Run `[read_start ; P(M) ; read_end]` once for each row."""
        return self.backbone.prefix(self._surround("read", memory.tensors))

    def _start(self, batch: int) -> Tensors:
        tensors: Tensors = {"memory": self.initial_memory}
        if self.projection == "per_sample" and self.proj is not None:
            tensors |= {"proj_weight": self.proj.weight, "proj_bias": self.proj.bias}
        return {name: tensor.expand(batch, *tensor.shape) for name, tensor in tensors.items()}

    def _rates(self) -> Rates:
        rates: dict[str, float | Tensor] = dict.fromkeys(("memory", "proj_weight", "proj_bias"), self.inner_lr)
        if self.log_inner_lr is not None:
            rates["memory"] = self.log_inner_lr.exp().to(self.initial_memory.dtype)
        return rates

    def _project(self, tensors: Tensors) -> Tensor:
        memory = tensors["memory"].to(self.initial_memory.dtype)
        if "proj_weight" in tensors:
            return torch.baddbmm(tensors["proj_bias"][:, None], memory, tensors["proj_weight"].transpose(1, 2))
        return memory if self.proj is None else self.proj(memory)

    def _surround(self, phase: str, tensors: Tensors) -> Tensor:
        """Prefix embeddings `[start (c) ; P(M) (m) ; end (c)]`, shape (batch, m + 2c, d)."""
        memory = self._project(tensors)
        if not self.control:
            return memory
        start, end = (self.control[f"{phase}_{side}"].expand(len(memory), -1, -1) for side in ("start", "end"))
        return torch.cat([start, memory, end], dim=1)

    def _embed_context(self, context: Tokens) -> Tensor:
        # The last token is predicted but never an input.
        return self.backbone.embed(context.ids[:, :-1])

    def _losses(self, tensors: Tensors, context: Tokens, embeds: Tensor) -> Tensor:
        prefix = self._surround("write", tensors)
        with self.backbone.without_dropout(), _active(self.adapters):
            hidden = self.backbone.hidden(torch.cat([prefix, embeds], dim=1))
            head = self.backbone.head if self.write_head is None else self.write_head
            return token_losses(hidden[:, prefix.shape[1] - 1 :], head, context.ids, context.mask)


def _check(name: str, value: object, good: bool, wanted: str) -> None:
    if not good:
        raise GradmemError(f"{name} must be {wanted}, not {value!r}")


def _add_lora(backbone: Backbone, rank: int) -> list[nn.Module]:
    """Put LoRA adapters on all linear layers of the blocks, switched off; return the adapted layers."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise GradmemError("write_lora needs peft: pip install 'gradmem[train]'") from error
    transposed = any(isinstance(module, Conv1D) for module in backbone.modules())
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM", fan_in_fan_out=transposed
    )
    trainable = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    inject_adapter_in_model(config, backbone.model)
    layers = [module for module in backbone.modules() if isinstance(module, BaseTunerLayer)]
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_("lora_" in name or name.replace(".base_layer", "") in trainable)
    _switch(layers, False)
    return layers


def _switch(layers: list[nn.Module], on: bool) -> None:
    # Not enable_adapters(), which also clears requires_grad of the adapter weights.
    for layer in layers:
        layer._disable_adapters = not on  # type: ignore[assignment]


@contextmanager
def _active(layers: list[nn.Module]) -> Iterator[None]:
    _switch(layers, True)
    try:
        yield
    finally:
        _switch(layers, False)
