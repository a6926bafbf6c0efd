"""Base of methods whose memory is vectors before the input."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ...backbone import Backbone
from ...batch import Tokens
from ...errors import GradmemError, require
from ...inner.objective import token_losses
from ...inner.optimizers import Tensors
from ...memory import Memory
from ...ops.head import ScaledHead
from ...prefix import Prefix
from .form import Form
from .method import Method
from .options import Options
from .written import compare_forms

Head = Literal["none", "copy", "random"]
Phase = Literal["write", "read"]


@dataclass(frozen=True, kw_only=True)
class PrefixOptions(Options):
    """Options of methods whose memory is vectors."""

    n_mem: int = 8
    """Number of memory vectors, m."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require("n_mem", self.n_mem, self.n_mem >= 1, "at least 1")


class PrefixMethod(Method):
    """Base of methods that keep m memory vectors M, with c control vectors on each side of them, or another `Form`.

    With vectors, READ runs `[read_start (c) ; P(M) (m) ; read_end (c)]` before a query. WRITE runs the same before the
    context, with its own control vectors; the last of these m + 2c positions predicts the first context token.

    Parameters
    ----------
    backbone : Backbone
    n_mem : int
        Number of memory vectors, m.
    n_ctrl : int
        Number of control vectors on each side, c.
    form : Form, optional
        The form of the memory, if it is not vectors.
    """

    initial_memory: nn.Parameter
    """M0, shape (m, d); only of vectors."""
    write_head: nn.Linear | None
    """Output layer of WRITE; None if it is the LM head."""

    def __init__(self, backbone: Backbone, n_mem: int, n_ctrl: int = 0, form: Form | None = None) -> None:
        super().__init__(backbone)
        self.n_ctrl, self.form = n_ctrl, form
        if form is None:
            self.initial_memory = self._new_vectors(n_mem)
        sides = ("write_start", "write_end", "read_start", "read_end") if n_ctrl else ()
        self.control = nn.ParameterDict({name: self._new_vectors(n_ctrl) for name in sides})

    # Parameters that subclasses create

    def _new_vectors(self, count: int) -> nn.Parameter:
        """Draw vectors with the standard deviation of the token embeddings."""
        return nn.Parameter(self.backbone.random_embeddings(count))

    def _new_projection(self, *, identity: bool) -> nn.Linear:
        """Create a linear map d -> d with bias: the identity, or with PyTorch's initialization."""
        like = self.initial_memory
        built = nn.Linear(self.backbone.width, self.backbone.width, dtype=like.dtype, device=like.device)
        if identity:
            nn.init.eye_(built.weight)
            nn.init.zeros_(built.bias)
        return built

    def _new_write_head(self, kind: Head) -> nn.Linear | None:
        """Create an output layer for WRITE, without bias: none, a copy of the LM head, or random."""
        if kind == "none":
            return None
        like, head = self.backbone.model.get_input_embeddings().weight, self.backbone.head
        weight = head.weight * head.scale if isinstance(head, ScaledHead) else head.weight
        built = nn.Linear(self.backbone.width, weight.shape[0], bias=False, dtype=like.dtype, device=like.device)
        if kind == "copy":
            built.weight = nn.Parameter(weight.detach().clone())
        else:
            nn.init.normal_(built.weight, std=float(like.detach().float().std()))
        return built

    # The interface

    @property
    def n_mem(self) -> int:
        """Number of memory vectors; 0 if the memory has another form."""
        return self.initial_memory.shape[0] if self.form is None else 0

    @property
    def slots(self) -> int:
        """Positions that a memory takes before the tokens."""
        return self.n_mem if self.form is None else self.form.slots

    @property
    def prefix_length(self) -> int:
        """Positions before the first token: memory, and control vectors or the vector that begins a text."""
        return self.n_mem + 2 * self.n_ctrl if self.form is None else self.form.length

    @property
    def predicts_first(self) -> bool:
        """Whether something predicts the first token after the memory."""
        return self.form is None or self.form.begin is not None

    @property
    def max_query(self) -> int:
        """Most tokens of a query with its answer: the backbone's positions less the prefix."""
        return self.backbone.max_positions - self.prefix_length

    @property
    def max_context(self) -> int:
        """Longest context in tokens: the backbone's positions less the prefix."""
        return self.max_query

    def check(self, memory: Memory, what: str) -> None:
        """Raise `GradmemError` unless the memory has the tensors and shapes that this method writes."""
        compare_forms(memory, Memory(self._start(1)), what)

    def inputs(self, memory: Memory) -> tuple[Tensor, Tensor]:
        """Build what READ runs before a query: `[read_start ; P(M) ; read_end]`, as input embeddings.

        Returns
        -------
        embeds : Tensor, shape (batch, positions, d)
        real : Tensor, bool, shape (batch, positions)
            False at the pads of shorter rows, which stand last; on the CPU.

        Raises
        ------
        GradmemError
            If the memory is not vectors.
        """
        if self.form is not None:
            raise GradmemError("this memory is keys and values or a change of weights: only vectors are model inputs")
        embeds = self._surround("read", memory.tensors)
        return embeds, torch.ones(embeds.shape[:2], dtype=torch.bool)

    def prefix(self, memory: Memory) -> Prefix:
        """Run what READ places before a query, with vectors the `inputs`, once for each row."""
        if self.form is not None:
            return self.form.prefix(self.backbone, memory.tensors)
        return self.backbone.prefix(*self.inputs(memory))

    def token_losses(self, memory: Memory, context: Tokens) -> Tensor:
        """Compute the loss of each context token given a memory: shape (batch, length), in nats."""
        return self._losses(memory.tensors, context, self._embed_context(context))

    @torch.no_grad()
    def reconstruct(self, memory: Memory, lengths: Sequence[int]) -> list[list[int]]:
        """Reconstruct contexts with the control vectors and the output layer of WRITE; see `Method.reconstruct`."""
        prefix = self._before_context(memory.tensors)
        head = self.backbone.head if self.write_head is None else self.write_head
        tokens = [head(prefix.last).argmax(-1, keepdim=True)]
        with prefix.active():
            for _ in range(max(lengths) - 1):
                hidden = self.backbone.hidden(self.backbone.embed(tokens[-1]), prefix.cache)
                tokens.append(head(hidden[:, -1]).argmax(-1, keepdim=True))
        return [row[:length] for row, length in zip(torch.cat(tokens, 1).tolist(), lengths, strict=True)]

    # Steps of WRITE that subclasses use or override

    @abstractmethod
    def _project(self, phase: Phase, tensors: Tensors) -> Tensor:
        """Map memory vectors to input embeddings, P(M): shape (batch, m, d)."""

    def _start(self, batch: int) -> Tensors:
        """Build the tensors of a memory that nothing was written into."""
        return {"memory": self.initial_memory.expand(batch, -1, -1)} if self.form is None else self.form.start(batch)

    def _before_context(self, tensors: Tensors) -> Prefix:
        """Run what WRITE places before a context."""
        if self.form is not None:
            return self.form.prefix(self.backbone, tensors)
        return self.backbone.prefix(self._surround("write", tensors))

    def _surround(self, phase: Phase, tensors: Tensors) -> Tensor:
        """Build the prefix embeddings `[start (c) ; P(M) (m) ; end (c)]`: shape (batch, m + 2c, d)."""
        memory = self._project(phase, tensors)
        if not self.control:
            return memory
        start, end = (self.control[f"{phase}_{side}"].expand(len(memory), -1, -1) for side in ("start", "end"))
        return torch.cat([start, memory, end], dim=1)

    def _embed_context(self, context: Tokens) -> Tensor:
        # The last token is predicted but never an input, unless there is nothing else to run.
        least = 0 if self.predicts_first else 1
        return self.backbone.embed(context.ids[:, : max(least, context.ids.shape[1] - 1)])

    def _losses(self, tensors: Tensors, context: Tokens, embeds: Tensor) -> Tensor:
        return self._losses_of(self._hidden(tensors, embeds), context)

    def _hidden(self, tensors: Tensors, embeds: Tensor) -> Tensor:
        """Run a context as WRITE does: hidden states of shape (batch, length + 1, d); row t predicts token t."""
        if self.form is not None:
            return self.form.hidden(self.backbone, tensors, embeds)
        hidden = self.backbone.hidden(torch.cat([self._surround("write", tensors), embeds], dim=1))
        return hidden[:, self.prefix_length - 1 :]

    def _losses_of(self, hidden: Tensor, context: Tokens) -> Tensor:
        """Compute token losses (batch, length), zero at pads, from the hidden states that predict."""
        head = self.backbone.head if self.write_head is None else self.write_head
        return token_losses(hidden[:, : context.ids.shape[1]], head, context.ids, context.mask)


def pads_last(embeds: Tensor, real: Tensor) -> Tensor:
    """Move the pads of each row to its end, where causal attention hides them and positions do not count them.

    Parameters
    ----------
    embeds : Tensor, shape (batch, length, d)
    real : Tensor, bool, shape (batch, length)
    """
    order = (~real).to(torch.uint8).argsort(dim=1, stable=True)
    return embeds.take_along_dim(order[..., None], dim=1)
