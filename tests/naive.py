"""GradMem, slow and obvious: section 3 of arXiv 2603.13875 line by line, one sample and one step at a time.

Every forward pass is the whole model on the whole unpadded input. Only the parameters come from the method
under test: no line of `gradmem.inner` or `gradmem.methods` runs here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from gradmem.batch import Batch


def attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None = None, causal: bool = True
) -> Tensor:
    """Softmax attention as it is defined, on whole matrices with repeated keys."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * scaling
    if mask is None and causal:
        queries, keys = scores.shape[2:]
        mask = torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(-1) @ value).transpose(1, 2)


def rms_norm(self: Any, hidden: Tensor) -> Tensor:
    """The forward of an RMS norm as it is defined."""
    return self.weight * hidden / (hidden.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt()


# Transformers' eager attention takes its softmax in float32 even in a float64 model.
AttentionInterface.register("naive", lambda _, q, k, v, mask, scaling, **options: (attention(q, k, v, scaling), None))
AttentionMaskInterface.register("naive", lambda **options: None)


@dataclass
class Naive:
    """The options carry the names that `GradMem` gives them; `method` is where the parameters live."""

    method: Any
    write_steps: int
    inner_lr: float
    n_mem: int = 3
    learn_inner_lr: bool = False
    learn_momentum: bool = False
    inner_optimizer: str = "sgd"
    clip_value: float | None = None
    clip_norm: float | None = None
    order: str = "second"
    last_k: int | None = None
    n_ctrl: int = 0
    projection: str = "none"
    write_head: str = "none"

    def start(self) -> dict[str, Tensor]:
        """The unwritten memory."""
        start = {"memory": self.method.initial_memory}
        if self.projection == "per_sample":
            start |= {"proj_weight": self.method.proj.weight, "proj_bias": self.method.proj.bias}
        return start

    def write(
        self, context: Tensor, written: dict[str, Tensor] | None = None
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Context ids (S,) -> what was written, without a batch dimension, and the loss before each step."""
        written = written or self.start()
        mean = dict.fromkeys(written, 0.0)
        square = dict.fromkeys(written, 0.0)
        velocity = dict.fromkeys(written, 0.0)
        losses = []
        for step in range(1, self.write_steps + 1):
            if self.order == "none":
                written = {name: tensor.detach().requires_grad_() for name, tensor in written.items()}
            loss = self.context_loss(written, context)
            grads = torch.autograd.grad(loss, list(written.values()), create_graph=True)
            full = self.order == "second" and (self.last_k is None or step > self.write_steps - self.last_k)
            after = {}
            for (name, tensor), grad in zip(written.items(), grads, strict=True):
                direction = self.clipped(grad if full else grad.detach())
                if self.inner_optimizer == "adam":
                    mean[name] = 0.9 * mean[name] + 0.1 * direction
                    square[name] = 0.999 * square[name] + 0.001 * direction**2
                    scale = (square[name] / (1 - 0.999**step) + 1e-16).sqrt()
                    direction = mean[name] / (1 - 0.9**step) / scale
                if self.inner_optimizer == "published_adam":
                    constant = grad.detach().clamp(-10, 10)
                    mean[name] = 0.9 * mean[name] + 0.1 * constant
                    square[name] = 0.999 * square[name] + 0.001 * constant**2
                    scale = (square[name] / (1 - 0.999**step)).clamp_min(1e-8).sqrt() + 1e-8
                    direction = mean[name] / (1 - 0.9**step) / scale
                if self.learn_momentum:
                    direction = velocity[name] = direction + self.method.momentum[step - 1] * velocity[name]
                after[name] = tensor - self.rate(name, step) * direction
            written = after
            losses.append(loss)
        if self.order == "none":
            written = {name: tensor.detach() for name, tensor in written.items()}
        return written, losses

    def context_loss(self, written: dict[str, Tensor], context: Tensor) -> Tensor:
        """Mean cross-entropy of the context tokens; the last prefix vector predicts the first one."""
        logits = self.forward("write", written, context)
        return sum(-F.log_softmax(logits[t], 0)[token] for t, token in enumerate(context)) / len(context)

    def read(self, written: dict[str, Tensor], query: Tensor) -> Tensor:
        """Query ids (Q,) -> logits (Q + 1, V): row t predicts token t, the last row what follows."""
        return self.forward("read", written, query)

    def loss(self, batch: Batch, auxiliary: float = 0.0) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Outer loss of a batch, and what was written for each context."""
        memories, last = [], []
        for ids, mask in zip(batch.context.ids, batch.context.mask, strict=True):
            written, losses = self.write(ids[mask])
            memories.append(written)
            last += losses[-1:]
        total, count = torch.zeros((), dtype=torch.float64), 0
        for ids, mask, labels, row in zip(batch.queries.ids, batch.queries.mask, batch.labels, batch.rows, strict=True):
            logits = self.read(memories[row], ids[mask])
            for t, label in enumerate(labels[mask]):
                if label != -100:
                    total, count = total - F.log_softmax(logits[t], 0)[label], count + 1
        loss = total / count
        if last:
            loss = loss + auxiliary * sum(last) / len(last)
        return loss, memories

    def forward(self, phase: str, written: dict[str, Tensor], ids: Tensor) -> Tensor:
        """Logits that count, (len(ids) + 1, V), of `[start ; P(M) ; end ; E(ids)]`."""
        model = self.method.backbone.model
        parts = [self.vectors(written), model.get_input_embeddings()(ids)]
        if self.n_ctrl:
            parts.insert(0, self.method.control[f"{phase}_start"])
            parts.insert(2, self.method.control[f"{phase}_end"])
        model.set_attn_implementation("naive")
        output = model(inputs_embeds=torch.cat(parts)[None], use_cache=False, output_hidden_states=True)
        logits = output.logits[0]
        if phase == "write" and self.write_head != "none":
            logits = output.hidden_states[-1][0] @ self.method.write_head.weight.T
        return logits[-len(ids) - 1 :]

    def vectors(self, written: dict[str, Tensor]) -> Tensor:
        """Memory vectors as they enter the model."""
        memory = written["memory"]
        if self.projection == "proj":
            memory = memory @ self.method.proj.weight.T + self.method.proj.bias
        if self.projection == "per_sample":
            memory = memory @ written["proj_weight"].T + written["proj_bias"]
        return memory

    def clipped(self, grad: Tensor) -> Tensor:
        """Clip each element, then the norm."""
        if self.clip_value is not None:
            grad = torch.where(grad.abs() > self.clip_value, self.clip_value * grad.sign(), grad)
        if self.clip_norm is not None:
            norm = (grad**2).sum().sqrt()
            if norm > self.clip_norm:
                grad = grad * self.clip_norm / (norm + 1e-6)
        return grad

    def rate(self, name: str, step: int) -> float | Tensor:
        """Inner learning rate; the learned ones are one for each memory vector (and step), as logarithms."""
        if self.learn_inner_lr and name == "memory":
            learned = self.method.log_inner_lr
            return math.e ** (learned[step - 1] if self.learn_momentum else learned)
        return self.inner_lr


EVERYTHING = {
    "n_ctrl": 2,
    "projection": "per_sample",
    "write_head": "random",
    "clip_value": 0.05,
    "clip_norm": 0.2,
    "learn_inner_lr": True,
    "write_steps": 3,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "second": {},
    "first": {"order": "first"},
    "none": {"order": "none"},
    "last_k": {"write_steps": 3, "last_k": 1},
    "last_k_zero": {"last_k": 0},
    "no_steps": {"write_steps": 0},
    "one_vector": {"n_mem": 1},
    "ctrl": {"n_ctrl": 2},
    "proj": {"projection": "proj"},
    "per_sample": {"projection": "per_sample"},
    "per_sample_first": {"projection": "per_sample", "order": "first"},
    "per_sample_none": {"projection": "per_sample", "order": "none"},
    "head_copy": {"write_head": "copy"},
    "head_random": {"write_head": "random"},
    "clip_value": {"clip_value": 0.05},
    "clip_norm": {"clip_norm": 0.1},
    "learned_rate": {"learn_inner_lr": True},
    "learned_rate_first": {"learn_inner_lr": True, "order": "first"},
    "learned_rate_none": {"learn_inner_lr": True, "order": "none"},
    "momentum": {"learn_inner_lr": True, "learn_momentum": True, "write_steps": 3},
    "momentum_first": {"learn_inner_lr": True, "learn_momentum": True, "write_steps": 3, "order": "first"},
    "momentum_none": {"learn_inner_lr": True, "learn_momentum": True, "write_steps": 3, "order": "none"},
    "adam": {"inner_optimizer": "adam", "inner_lr": 0.05},
    "adam_first": {"inner_optimizer": "adam", "inner_lr": 0.05, "order": "first"},
    "adam_last_k": {"inner_optimizer": "adam", "inner_lr": 0.05, "write_steps": 3, "last_k": 2},
    "everything": EVERYTHING,
    "everything_last_k": EVERYTHING | {"last_k": 2},
    "everything_adam": EVERYTHING | {"inner_optimizer": "adam", "inner_lr": 0.03},
    "everything_momentum": EVERYTHING | {"learn_momentum": True},
    "everything_none": EVERYTHING | {"order": "none"},
}
