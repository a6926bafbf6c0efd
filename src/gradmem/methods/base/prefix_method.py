"""What the methods share whose memory is vectors before the input."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ...backbone import Backbone
from ...batch import Tokens
from ...errors import require
from ...inner.objective import token_losses
from ...inner.optimizers import Tensors
from ...memory import Memory
from ...ops.head import ScaledHead
from ...prefix import Prefix
from .method import Method

Head = Literal["none", "copy", "random"]
Phase = Literal["write", "read"]


class PrefixMethod(Method):
    """Base of methods that keep m memory vectors M, and c control vectors on both sides of them.

    READ runs `[read_start (c) ; P(M) (m) ; read_end (c)]` before a query. WRITE runs the same with control vectors of
    its own before the context, and the last of these m + 2c positions predicts the first context token.

    Parameters
    ----------
    backbone : Backbone
    n_mem, write_steps, n_ctrl : int
        As the subclasses describe them.
    """

    write_head: nn.Linear | None

    def __init__(self, backbone: Backbone, n_mem: int, write_steps: int, n_ctrl: int) -> None:
        super().__init__(backbone)
        require("n_mem", n_mem, n_mem >= 1, "at least 1")
        require("write_steps", write_steps, write_steps >= 0, "at least 0")
        require("n_ctrl", n_ctrl, n_ctrl >= 0, "at least 0")
        self.write_steps, self.n_ctrl = write_steps, n_ctrl
        self.initial_memory = self._new_vectors(n_mem)
        sides = ("write_start", "write_end", "read_start", "read_end") if n_ctrl else ()
        self.control = nn.ParameterDict({name: self._new_vectors(n_ctrl) for name in sides})

    # What subclasses build themselves of

    def _new_vectors(self, count: int) -> nn.Parameter:
        """Vectors drawn as wide as the token embeddings."""
        like = self.backbone.model.get_input_embeddings().weight
        return nn.Parameter(torch.randn(count, self.backbone.width, dtype=like.dtype, device=like.device) * _std(like))

    def _new_projection(self, *, identity: bool) -> nn.Linear:
        """Linear map d -> d with bias: the identity, or PyTorch's own start."""
        like = self.initial_memory
        built = nn.Linear(self.backbone.width, self.backbone.width, dtype=like.dtype, device=like.device)
        if identity:
            nn.init.eye_(built.weight)
            nn.init.zeros_(built.bias)
        return built

    def _new_write_head(self, kind: Head) -> nn.Linear | None:
        """Output layer of WRITE without bias: none of its own, a copy of the LM head, or drawn independently."""
        require("write_head", kind, kind in ("none", "copy", "random"), "none, copy or random")
        if kind == "none":
            return None
        like, head = self.initial_memory, self.backbone.head
        weight = head.weight * head.scale if isinstance(head, ScaledHead) else head.weight
        built = nn.Linear(self.backbone.width, weight.shape[0], bias=False, dtype=like.dtype, device=like.device)
        if kind == "copy":
            built.weight = nn.Parameter(weight.detach().clone())
        else:
            nn.init.normal_(built.weight, std=_std(self.backbone.model.get_input_embeddings().weight))
        return built

    # The interface

    @property
    def n_mem(self) -> int:
        """Number of memory vectors."""
        return self.initial_memory.shape[0]

    @property
    def prefix_length(self) -> int:
        """Positions before the first token: memory and control vectors."""
        return self.n_mem + 2 * self.n_ctrl

    @property
    def max_query(self) -> int:
        """Longest query and answer in tokens: what the backbone's positions leave beside the prefix."""
        return self.backbone.max_positions - self.prefix_length

    @property
    def max_context(self) -> int:
        """Longest context in tokens: what the backbone's positions leave beside the prefix."""
        return self.max_query

    def check(self, memory: Memory, what: str) -> None:
        """Raise `GradmemError` unless the memory has the tensors and shapes that this method writes."""
        self._compare(memory, Memory(self._start(1)), what)

    def prefix(self, memory: Memory) -> Prefix:
        """Run `[read_start ; P(M) ; read_end]` once for each row."""
        return self.backbone.prefix(self._surround("read", memory.tensors))

    def token_losses(self, memory: Memory, context: Tokens) -> Tensor:
        """Loss of each context token under a memory, shape (batch, length), nats."""
        return self._losses(memory.tensors, context, self._embed_context(context))

    @torch.no_grad()
    def reconstruct(self, memory: Memory, lengths: Sequence[int]) -> list[list[int]]:
        """Read contexts back as WRITE reads them, with its control vectors and output layer; see `Method`."""
        prefix = self.backbone.prefix(self._surround("write", memory.tensors))
        head = self.backbone.head if self.write_head is None else self.write_head
        tokens = [head(prefix.last).argmax(-1, keepdim=True)]
        for _ in range(max(lengths) - 1):
            hidden = self.backbone.hidden(self.backbone.embed(tokens[-1]), prefix.cache)
            tokens.append(head(hidden[:, -1]).argmax(-1, keepdim=True))
        return [row[:length] for row, length in zip(torch.cat(tokens, 1).tolist(), lengths, strict=True)]

    # What WRITE is built of

    @abstractmethod
    def _project(self, phase: Phase, tensors: Tensors) -> Tensor:
        """Memory vectors as they enter the model, P(M), shape (batch, m, d)."""

    def _start(self, batch: int) -> Tensors:
        """Tensors of the unwritten memory."""
        return {"memory": self.initial_memory.expand(batch, -1, -1)}

    def _surround(self, phase: Phase, tensors: Tensors) -> Tensor:
        """Prefix embeddings `[start (c) ; P(M) (m) ; end (c)]`, shape (batch, m + 2c, d)."""
        memory = self._project(phase, tensors)
        if not self.control:
            return memory
        start, end = (self.control[f"{phase}_{side}"].expand(len(memory), -1, -1) for side in ("start", "end"))
        return torch.cat([start, memory, end], dim=1)

    def _embed_context(self, context: Tokens) -> Tensor:
        # The last token is predicted but never an input.
        return self.backbone.embed(context.ids[:, :-1])

    def _losses(self, tensors: Tensors, context: Tokens, embeds: Tensor) -> Tensor:
        return self._losses_of(self._hidden(tensors, embeds), context)

    def _hidden(self, tensors: Tensors, embeds: Tensor) -> Tensor:
        """Hidden states of WRITE's prefix and of a context, shape (batch, m + 2c + length - 1, d)."""
        return self.backbone.hidden(torch.cat([self._surround("write", tensors), embeds], dim=1))

    def _losses_of(self, hidden: Tensor, context: Tokens) -> Tensor:
        """Token losses (batch, length) from hidden states that begin with the prefix's, zero at pads."""
        first, length = self.prefix_length - 1, context.ids.shape[1]
        head = self.backbone.head if self.write_head is None else self.write_head
        return token_losses(hidden[:, first : first + length], head, context.ids, context.mask)


def pads_last(embeds: Tensor, real: Tensor) -> Tensor:
    """Move the pads of each row behind what is real: causality then hides them, and positions count real ones only.

    Parameters
    ----------
    embeds : Tensor, shape (batch, length, d)
    real : Tensor, bool, shape (batch, length)
    """
    order = (~real).to(torch.uint8).argsort(dim=1, stable=True)
    return embeds.take_along_dim(order[..., None], dim=1)


def _std(tensor: Tensor) -> float:
    return float(tensor.detach().float().std())
