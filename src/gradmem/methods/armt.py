"""ARMT: associative memory in every layer (Associative Recurrent Memory Transformer, arXiv 2407.04841)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone import Backbone
from ..batch import Tokens
from ..errors import GradmemError, require
from ..inner.objective import token_losses
from ..inner.optimizers import Tensors
from ..memory import Memory
from ..ops.dtypes import no_autocast
from ..prefix import Prefix
from .base.one_pass import OnePassMethod
from .base.options import Options, keywords_of
from .base.state_prefix import StatePrefix
from .base.written import compare_forms

State = list[tuple[Tensor, Tensor]]
"""The memory of each layer: A (batch, features, d) and z (batch, features)."""
EPSILON = 1e-5


@dataclass(frozen=True, kw_only=True)
class ARMTOptions(Options):
    """Options of `armt`."""

    n_mem: int = 1
    """Number of memory tokens, M."""
    d_mem: int = 64
    """Width of the memory's keys and queries."""
    nu: int = 3
    """Degree of the DPFP features, of which there are 2 * nu * d_mem."""
    correction: bool = True
    """Count in z only what is new in a key (gamma in the paper)."""
    segment_length: int | None = None
    """Most tokens of a segment; by default every context is one segment."""
    leak_pads: bool = False
    """Treat pads as the published experiments did: memory tokens attend to the pads of their segment, are numbered
    after them, and also write if a segment is all pads. By default pads change nothing. No recipe uses it; comparison
    with the published code needs it."""
    reconstruction: bool = False
    """Also learn to reconstruct the context from the memory; the recipe's `write_loss_weight` weights it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n_mem", "d_mem", "nu"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")


class ARMT(OnePassMethod):
    """An associative matrix in every layer, which learned memory tokens write and every position reads.

    WRITE runs the context once, in one segment or several. Each segment is followed by M memory tokens, whose hidden
    states each layer stores in its matrix by the delta rule. READ adds to the input of each layer what its matrix
    returns for it. Only the matrices pass from one segment to the next.

    Parameters
    ----------
    backbone : Backbone
        Its attention must take masks, as eager and SDPA attention do.
    **options
        The fields of `ARMTOptions`.
    """

    @keywords_of(ARMTOptions)
    def __init__(self, backbone: Backbone, **options: Any) -> None:
        own = ARMTOptions(**options)
        super().__init__(backbone)
        if backbone.windows or not backbone.takes_masks:
            kind = backbone.model.config.model_type
            reason = f"has {backbone.windows[0]}" if backbone.windows else "takes none"
            raise GradmemError(f"armt needs attention masks, and '{kind}' {reason}: use a llama backbone")
        most, length = backbone.max_positions - own.n_mem, own.segment_length
        require("segment_length", length, length is None or 1 <= length <= most, f"1 to {most}")
        self.options, self.reconstruction = own, own.reconstruction
        like = backbone.model.get_input_embeddings().weight
        start = 0.02 * torch.randn(own.n_mem, backbone.width, dtype=like.dtype, device=like.device)
        self.memory_tokens = nn.Parameter(start)
        self.associative: Any = nn.ModuleList(_AssociativeLayer(backbone.width, own).to(like) for _ in backbone.blocks)

    @property
    def n_mem(self) -> int:
        """Number of memory tokens."""
        return self.memory_tokens.shape[0]

    @property
    def max_context(self) -> int:
        """Longest context in tokens: no limit in segments, else the backbone's positions less the memory tokens."""
        return 2**31 - 1 if self.options.segment_length else self.backbone.max_positions - self.n_mem

    @property
    def max_query(self) -> int:
        """Most tokens of a query with its answer."""
        return self.backbone.max_positions

    def write_segment(self, tokens: Tokens, state: State | None) -> tuple[Tensor, State]:
        """Run one segment and its memory tokens; every layer reads its state, then writes to it.

        Parameters
        ----------
        tokens : Tokens, shape (batch, length)
        state : list of (A, z), or None
            The state after earlier segments; None for the first segment.

        Returns
        -------
        hidden : Tensor, shape (batch, length, d)
            After the final norm, without the memory tokens.
        state : list of (A, z)
            A (batch, features, d) and z (batch, features) of every layer.
        """
        memory = self.memory_tokens.expand(len(tokens), -1, -1)
        embeds = torch.cat([self.backbone.embed(tokens.ids), memory], dim=1)
        mask, positions = self._mask(tokens.mask, embeds.dtype), self._positions(tokens)
        with self.reading(state), self._watching() as outputs:
            hidden = self.backbone.hidden(embeds, mask=mask, positions=positions)
        writes = tokens.mask.any(1) | self.options.leak_pads
        olds = [None] * len(outputs) if state is None else state
        written = [
            layer.write(output[:, -self.n_mem :], old, writes)
            for layer, output, old in zip(self.associative, outputs, olds, strict=True)
        ]
        return hidden[:, : -self.n_mem], written

    def prefix(self, memory: Memory) -> Prefix:
        """Build a prefix without positions. Nothing predicts the first token of a query: its hidden state is zero."""
        like = self.memory_tokens
        state = {name: tensor.to(like.dtype) for name, tensor in memory.tensors.items()}
        last = like.new_zeros(len(memory), self.backbone.width)
        return StatePrefix(state, last, self.backbone.new_cache(), lambda state: self.reading(_unpack(state)))

    def token_losses(self, memory: Memory, context: Tokens) -> Tensor:
        """Compute the loss of each context token given the memory: shape (batch, length), in nats.

        The context is read in the segments in which it was written. Nothing predicts the first token: it has the loss
        of a uniform guess.
        """
        prefix = self.prefix(memory)
        with prefix.active():
            parts = [self.backbone.hidden(self.backbone.embed(part.ids)) for part in self.segments(context)]
        hidden = torch.cat([prefix.last[:, None], *parts], dim=1)[:, :-1]
        return token_losses(hidden, self.backbone.head, context.ids, context.mask)

    def check(self, memory: Memory, what: str) -> None:
        """Raise `GradmemError` unless the memory has the tensors and shapes that this method writes."""
        compare_forms(memory, self._unwritten(1), what)

    @contextmanager
    def reading(self, state: State | None) -> Iterator[None]:
        """Let every layer read from its state within a context; with None, none reads."""
        with ExitStack() as stack:
            for block, layer, own in zip(self.backbone.blocks, self.associative, state or [], strict=False):
                stack.enter_context(block.register_forward_pre_hook(_reader(layer, own), with_kwargs=True))
            yield

    def segments(self, context: Tokens) -> list[Tokens]:
        """Split contexts into segments."""
        length = self.options.segment_length or context.ids.shape[1]
        return [Tokens(*part) for part in zip(context.ids.split(length, 1), context.mask.split(length, 1), strict=True)]

    def _unwritten(self, batch: int) -> Memory:
        return _pack([layer.empty(batch) for layer in self.associative])

    def _written(self, context: Tokens) -> Memory:
        state: State | None = None
        for segment in self.segments(context):
            _, state = self.write_segment(segment, state)
        assert state is not None
        return _pack(state)

    @contextmanager
    def _watching(self) -> Iterator[list[Tensor]]:
        """Collect the outputs of the layers within a context, each (batch, length, d)."""
        outputs: list[Tensor] = []

        def keep(block: nn.Module, inputs: Any, output: Any) -> None:
            outputs.append(output[0] if isinstance(output, tuple) else output)

        with ExitStack() as stack:
            for block in self.backbone.blocks:
                stack.enter_context(block.register_forward_hook(keep))
            yield outputs

    def _mask(self, real: Tensor, dtype: torch.dtype) -> Tensor:
        """Build the additive attention mask of a segment: (batch, 1, length + M, length + M).

        A token sees real tokens up to itself and no memory token; a memory token sees all tokens and all memory tokens.
        """
        length, memory = real.shape[1], real.new_ones(len(real), self.n_mem)
        keys = torch.cat([real, memory], dim=1)[:, None]
        size = keys.shape[2]
        seen = keys & torch.ones(size, size, dtype=torch.bool, device=real.device).tril()
        seen[:, length:] = True if self.options.leak_pads else keys
        if not self.options.leak_pads:
            # The softmax of a pad that sees nothing would be NaN.
            seen |= torch.eye(size, dtype=torch.bool, device=real.device)
        added = torch.zeros(seen.shape, dtype=dtype, device=real.device).masked_fill(~seen, torch.finfo(dtype).min)
        return added[:, None]

    def _positions(self, tokens: Tokens) -> Tensor:
        """Number the positions of a segment: shape (batch, length + M), memory tokens after the last token.

        Numbers start again in every segment; to relative positions (RoPE) this makes no difference.
        """
        batch, length = tokens.ids.shape
        ids = torch.arange(length + self.n_mem, device=tokens.ids.device).repeat(batch, 1)
        if not self.options.leak_pads:
            ids[:, length:] += (tokens.lengths - length)[:, None]
        return ids


class _AssociativeLayer(nn.Module):
    """The associative memory of one layer, paper section 2."""

    def __init__(self, d: int, options: ARMTOptions) -> None:
        super().__init__()
        self.nu, self.correction = options.nu, options.correction
        self.query = nn.Linear(d, options.d_mem, bias=False)
        self.key = nn.Linear(d, options.d_mem, bias=False)
        self.value = nn.Linear(d, d, bias=False)
        self.strength = nn.Linear(d, 1)
        # At first, reading adds nothing.
        nn.init.zeros_(self.value.weight)

    def empty(self, batch: int) -> tuple[Tensor, Tensor]:
        """Return an empty state."""
        features, d = 2 * self.nu * self.key.out_features, self.key.in_features
        like = self.value.weight
        return like.new_zeros(batch, features, d), like.new_zeros(batch, features)

    def features(self, vectors: Tensor) -> Tensor:
        """Compute DPFP features of unit length: (..., d_mem) -> (..., 2 * nu * d_mem)."""
        r = torch.cat([vectors.relu(), (-vectors).relu()], dim=-1)
        return F.normalize(torch.cat([r * r.roll(j, -1) for j in range(1, self.nu + 1)], dim=-1), dim=-1)

    def read(self, hidden: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
        """Add to hidden states (batch, length, d) what the state returns for them."""
        a, z = state
        with no_autocast(hidden):
            q = self.features(self.query(hidden.to(a.dtype)))
            return hidden + (q @ a / (q @ z[..., None] + EPSILON)).to(hidden.dtype)

    def write(self, rows: Tensor, state: tuple[Tensor, Tensor] | None, writes: Tensor) -> tuple[Tensor, Tensor]:
        """Store the hidden states of memory tokens (batch, M, d) in the rows for which `writes` (batch,) is true."""
        with no_autocast(rows):
            rows = rows.to(self.value.weight.dtype)
            k, v, b = self.features(self.key(rows)), self.value(rows), self.strength(rows).sigmoid()
            if state is None:
                return k.mT @ (b * v), k.sum(1)
            a, z = state
            known = k @ z[..., None] + EPSILON
            novel = torch.ones_like(known)
            if self.correction:
                novel = (1 - known / k.square().sum(-1, keepdim=True)).clamp(0, 1).detach()
            new_a = a + k.mT @ (b * (v - k @ a / known))
            new_z = z + (novel * k).sum(1)
            return torch.where(writes[:, None, None], new_a, a), torch.where(writes[:, None], new_z, z)


def _reader(layer: _AssociativeLayer, state: tuple[Tensor, Tensor]) -> Callable[..., Any]:
    """Build a pre-hook of a decoder layer that adds to its input what the state returns."""

    def hook(
        block: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if inputs:
            return (layer.read(inputs[0], state), *inputs[1:]), options
        return inputs, options | {"hidden_states": layer.read(options["hidden_states"], state)}

    return hook


def _pack(state: State) -> Memory:
    return Memory({f"layers.{i}.{name}": own[j] for i, own in enumerate(state) for j, name in enumerate("Az")})


def _unpack(state: Tensors) -> State:
    return [(state[f"layers.{i}.A"], state[f"layers.{i}.z"]) for i in range(len(state) // 2)]
