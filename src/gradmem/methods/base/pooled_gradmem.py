"""GradMem on vectors that start as pooled hidden states of the context, and enter the model at an inner layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbone import Backbone
from ...batch import Tokens
from ...compaction.text import repeat_query
from ...errors import GradmemError, require
from ...inner.optimizers import Rates, Tensors
from ...memory import Memory
from ...ops.dtypes import no_autocast, wide
from ...ops.layer_input import layer_input, replaced_input
from ...prefix import Prefix
from .entries_method import QUESTION_ROOM
from .gradmem_options import GradMemOptions
from .head_prefix import HeadPrefix
from .inner_loop import InnerLoop
from .options import keywords_of
from .repeating import Repeating
from .written import Written, compare_forms

LARGEST = 10.0
"""Largest absolute score of a token."""


class PooledGradMem(InnerLoop, Repeating):
    """GradMem whose vectors start as pooled hidden states of the context: K steps move them.

    WRITE runs the context through the first `layer` layers. Vector 0 is the hidden state of the first token, to which
    much attention goes whatever the text; each other one is pooled from neighbours; see `Pooling`. READ puts the
    vectors before the question at layer `layer`, each at the mean position of its tokens, and questions begin after the
    end of the context. The layers below see no memory.

    In the loss a token counts by a second learned weight. A learned inner rate is that of a vector times that of a
    coordinate. Before training both are the same everywhere.

    The meta-gradient passes through the steps, the weights, the pooling and the reading of the context.

    A memory holds `memory`, shape (batch, m, d), and two of int64: `positions`, shape (batch, m), and `start`, shape
    (batch,), the tokens of the context. A context of fewer tokens than vectors leaves the last ones zero, at
    position 0, and nothing reads them. A row is a chunk of a document, and a question reads all of them, one after the
    other.

    Parameters
    ----------
    backbone : Backbone
    **options
        The fields of `GradMemOptions`.

    Raises
    ------
    GradmemError
        If the model has fewer layers, does not obey attention masks, or accepts no positions.
    """

    compiles = False
    questions = None
    reads_together = True

    @keywords_of(GradMemOptions)
    def __init__(self, backbone: Backbone, **options: Any) -> None:
        own = GradMemOptions(**options)
        super().__init__(backbone)
        most = len(backbone.blocks) - 1
        require("layer", own.layer, own.layer <= most, f"at most {most}, the last layer of this model")
        if not (backbone.takes_positions and backbone.takes_masks and backbone.max_full_attention):
            kind = backbone.model.config.model_type
            raise GradmemError(f"`start: pooled` needs a model that obeys masks and positions, and '{kind}' does not")
        self.write_steps = own.write_steps
        self.pooling = Pooling(backbone)
        self.loss_weights = TokenWeights(backbone)
        self._prepare_descent(own, (own.n_mem, 1))
        like = torch.zeros(backbone.width, dtype=torch.float32, device=self.device)
        self.log_coordinate_lr = nn.Parameter(like) if own.learn_inner_lr else None

    @property
    def n_mem(self) -> int:
        """Number of memory vectors."""
        return self.options.n_mem

    @property
    def max_query(self) -> int:
        """Longest query and answer in tokens."""
        return self.backbone.max_full_attention // 2

    def texts_at_once(self, length: int) -> int:
        """Texts of so many tokens that are written in one batch."""
        return self.backbone.contexts_at_once(length)

    def trajectory(self, context: Tokens, steps: int, *, until: float | None = None) -> Iterator[Written]:
        """Yield the start, and the memory after every step; see `Method.trajectory`."""
        self._check_write(context, steps)
        with self.backbone.without_dropout():
            embeds = self.backbone.embed(context.ids)
            states = layer_input(self.backbone.blocks[self.options.layer], lambda: self.backbone.hidden(embeds))
            start, positions = self.pooling(states, context.mask, self.n_mem)
            weight = self.loss_weights(states, context.mask)
            weight = weight / weight.sum(1, keepdim=True).clamp_min(1e-30)
        forward_context, query = self._forward_context(), repeat_query(self.task)

        def loss(tensors: Tensors, ids: Tensor, mask: Tensor, weight: Tensor, *fixed: Tensor) -> Tensor:
            with forward_context(), self.backbone.without_dropout():
                prefix = self.prefix(_memory(tensors, *fixed))
                return (self.repeat_losses(prefix, Tokens(ids, mask), query) * weight).sum(1)

        fixed = positions, context.lengths
        given = [context.ids, context.mask, weight, *fixed]
        for step in self._states(loss, {"memory": start}, steps, given, until):
            losses = torch.stack(step.losses) if step.losses else states.new_zeros(0, len(context))
            yield Written(_memory(step.tensors, *fixed), losses, step.taken)

    def inner_parameters(self) -> list[nn.Parameter]:
        """Return the learned inner learning rates and momentum; see `Method.inner_parameters`."""
        own = self.log_coordinate_lr
        return super().inner_parameters() + ([] if own is None else [own])

    def _rates(self, step: int, names: Iterable[str]) -> Rates:
        rates, own = super()._rates(step, names), self.log_coordinate_lr
        if own is None:
            return rates
        factor = own.exp().to(self.backbone.model.get_input_embeddings().weight.dtype)
        return {name: rate * factor for name, rate in rates.items()}

    def without_text(self, rows: int) -> Memory:
        """Memories of no text; see `Method.without_text`."""
        zeros = self.backbone.model.get_input_embeddings().weight.new_zeros(rows, self.n_mem, self.backbone.width)
        return _memory({"memory": zeros.detach()}, zeros[..., 0].long(), zeros[:, 0, 0].long())

    def prefix(self, memory: Memory) -> Prefix:
        """Run the vectors from their layer on, once for each row."""
        vectors = memory.tensors["memory"].to(self.backbone.model.dtype)
        positions, start = (memory.tensors[name].to(vectors.device) for name in ("positions", "start"))
        cache, unused = self.backbone.new_cache(), positions == 0  # but the first vector stands there
        unused[:, 0] = start == 0
        with replaced_input(self.backbone.blocks[self.options.layer], vectors):
            self.backbone.hidden(torch.zeros_like(vectors), cache, positions=positions)
        last = vectors.new_zeros(len(vectors), self.backbone.width)
        heads = [layer.keys.shape[1] for layer in cache.layers]
        hidden = unused[:, None, None].repeat(1, len(heads), max(heads), 1)
        hidden[:, : self.options.layer] = True
        return HeadPrefix(Prefix(last, cache, start=start), self.backbone, hidden)

    def together(self, memory: Memory) -> Memory:
        """Put the vectors of all rows into one row; see `WholeContexts.together`.

        The texts stand one after the other, if the model has positions for all. If not, all begin at position 0. Only
        the first text keeps the state of its first token.
        """
        start = memory.tensors["start"]
        fits = int(start.sum()) + QUESTION_ROOM <= self.backbone.max_full_attention
        before = start.cumsum(0) - start if fits else torch.zeros_like(start)
        vectors, positions = [], []
        for row, length in enumerate(start.tolist()):
            own = slice(min(row, 1), min(length, self.n_mem))
            vectors.append(memory.tensors["memory"][row, own])
            positions.append(memory.tensors["positions"][row, own] + before[row])
        end = (before + start).max()[None]
        return _memory({"memory": torch.cat(vectors)[None]}, torch.cat(positions)[None], end)

    def check(self, memory: Memory, what: str) -> None:
        """Raise `GradmemError` unless the memory has the tensors and shapes that this method writes."""
        compare_forms(memory, self.without_text(1), what)
        for name in ("positions", "start"):
            found = memory.tensors[name]
            if found.is_floating_point() or not bool(((found >= 0) & (found <= self.max_context)).all()):
                raise GradmemError(f"{what} has {name} that are no numbers of tokens from 0 to {self.max_context}")


def _memory(tensors: Tensors, positions: Tensor, start: Tensor) -> Memory:
    return Memory(tensors | {"positions": positions, "start": start})


class TokenWeights(nn.Module):
    """Weigh the tokens of a text by their hidden states, after a layer norm. Before training all weigh the same.

    Parameters
    ----------
    backbone : Backbone
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        like = backbone.model.get_input_embeddings().weight
        self.score = nn.Parameter(torch.zeros(backbone.width, dtype=like.dtype, device=like.device))

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Return positive weights at the tokens of a mask, and 0 elsewhere.

        Parameters
        ----------
        states : Tensor, shape (batch, length, d)
        mask : Tensor, bool, shape (batch, length)

        Returns
        -------
        Tensor, at least float32, shape (batch, length)
        """
        with no_autocast(states):
            given = wide(states)
            score = F.layer_norm(given, given.shape[-1:]) @ self.score.to(given.dtype)
            return score.clamp(-LARGEST, LARGEST).exp() * mask


class Pooling(nn.Module):
    """Pool hidden states into fewer vectors, each a weighted mean of neighbours.

    The text is cut into parts of equal learned weight, one for each vector, so that tokens that matter share a vector
    with few others; a token at a cut belongs to both parts. This is continuous integrate-and-fire (arXiv 1905.11235)
    with a given number of vectors.

    Parameters
    ----------
    backbone : Backbone
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.weights = TokenWeights(backbone)

    def forward(self, states: Tensor, mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Pool the states of each row but its first, which stays as it is.

        Parameters
        ----------
        states : Tensor, shape (batch, length, d)
        mask : Tensor, bool, shape (batch, length)
            True at real tokens.
        count : int
            Vectors of a row. Rows of fewer tokens have as many vectors as tokens, and zeros after them.

        Returns
        -------
        vectors : Tensor, shape (batch, count, d)
        positions : Tensor, int64, shape (batch, count)
            The mean position of each vector's tokens, rounded.
        """
        later = mask.clone()
        later[:, 0] = False
        with no_autocast(states):
            given, weight = wide(states), self.weights(states, later)
            parts = later.sum(1, keepdim=True).clamp_max(count - 1)
            weight = parts * weight / weight.sum(1, keepdim=True).clamp_min(1e-30)
            end, part = weight.cumsum(1)[..., None], torch.arange(count - 1, device=states.device)
            shares = (end.minimum(part + 1) - (end - weight[..., None]).maximum(part)).clamp_min(0)
            pooled = torch.cat([given[:, :1], shares.mT @ given], dim=1)
            mean = (shares * torch.arange(states.shape[1], device=states.device)[:, None]).sum(1)
            return pooled.to(states.dtype), F.pad(mean.detach().round().long(), (1, 0))
