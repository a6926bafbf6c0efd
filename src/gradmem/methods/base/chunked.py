"""Base of methods that write long contexts in chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backbone import Backbone
from ...batch import Tokens
from ...errors import GradmemError, require
from ...inner.optimizers import Tensors
from ...memory import LENGTHS, Memory
from ...prefix import Prefix
from .chunks import ChunkMode, Chunks, chunk_counts, pack, pad_rows, ragged_index, split_chunks
from .form import Form
from .prefix_method import Head, PrefixMethod, PrefixOptions, pads_last
from .written import Written


@dataclass(frozen=True, kw_only=True)
class ChunkedOptions(PrefixOptions):
    """Options of methods that write contexts in chunks."""

    write_steps: int = 1
    """Default number of write steps K, taken on each chunk."""
    n_ctrl: int = 0
    """Number of control vectors before the memory and after it; WRITE and READ have their own."""
    write_head: Head = "none"
    """Output layer of WRITE: none of its own, or one that starts as a copy of the LM head, or a random one."""
    chunk_size: int | None = None
    """Most tokens of a chunk; by default a context is written whole."""
    chunk_mode: ChunkMode = "sequential"
    """How the chunks of a context are written into one memory. sequential: each starts from the memory that the one
    before it left. growing: so too, but the memory after every chunk is kept, and READ sees all of them together.
    independent: each starts from M0 and has a memory of its own, which READ sees together. joint: all share the same
    memory, and each step descends the mean loss of all their tokens. parallel: so too, but chunks count alike whatever
    their length, and the step is divided by their number once more. No recipe uses growing and parallel; the published
    code has them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require("write_steps", self.write_steps, self.write_steps >= 0, "at least 0")
        require("n_ctrl", self.n_ctrl, self.n_ctrl >= 0, "at least 0")


class ChunkedMethod(PrefixMethod):
    """Base of prefix methods that can write a context in chunks; subclasses implement `trajectory_from`.

    - "sequential": a chunk is written from the memory that the chunk before it left. The memory does not grow.
    - "growing": as "sequential", but the memory after every chunk is kept. READ sees them one after the other.
    - "independent": every chunk is written from the start, all in one batch, into n_mem vectors of its own. READ sees
      the vectors of all chunks, one chunk after the other. The tensors of such a memory have a second dimension, the
      chunks, and `lengths` says how many each row has.
    - "joint": every step descends the mean loss of the tokens of all chunks, each read on its own from the same memory.
      The memory does not grow and favours no chunk; time is linear in the context. For methods that name it in `modes`
      and implement `joint_trajectory`.
    - "parallel": as "joint", for the mean loss of chunks, divided by their number once more.

    Parameters
    ----------
    backbone : Backbone
    options : ChunkedOptions
    form : Form, optional
        As for `PrefixMethod`.
    """

    joins = True
    modes: Sequence[ChunkMode] = ("sequential", "independent")
    """The chunk modes of this method."""

    def __init__(self, backbone: Backbone, options: ChunkedOptions, form: Form | None = None) -> None:
        super().__init__(backbone, options.n_mem, options.n_ctrl, form)
        self.write_steps = options.write_steps
        self.chunk_by(options.chunk_size, options.chunk_mode)

    def trajectory_from(
        self, context: Tokens, start: Tensors, steps: int, until: float | None, more: bool = False
    ) -> Iterator[Written]:
        """Write whole contexts, starting from any memory; see `Method.trajectory`.

        Parameters
        ----------
        context : Tokens, shape (batch, length)
        start : dict of Tensor, shapes (batch, ...)
            The memory to start from.
        steps : int
        until : float or None
        more : bool
            Whether other chunks will be written starting from the result.
        """
        raise NotImplementedError

    def joint_trajectory(
        self, chunks: Tokens, rows: Tensor, start: Tensors, steps: int, until: float | None
    ) -> Iterator[Written]:
        """Write chunks into the memories of their rows, all at once; only for the modes "joint" and "parallel".

        Parameters
        ----------
        chunks : Tokens, shape (chunks, length)
        rows : Tensor, int64, shape (chunks,)
            The memory of each chunk.
        start : dict of Tensor, shapes (batch, ...)
        steps : int
        until : float or None
        """
        raise NotImplementedError

    def chunk_by(self, chunk_size: int | None, chunk_mode: ChunkMode | None = None) -> None:
        """Set how contexts are split into chunks; see `Method.chunk_by`."""
        good = chunk_size is None or (isinstance(chunk_size, int) and 1 <= chunk_size <= self.max_chunk)
        require("chunk_size", chunk_size, good, f"from 1 to {self.max_chunk} tokens, or null")
        require("chunk_mode", chunk_mode, chunk_mode is None or chunk_mode in self.modes, " or ".join(self.modes))
        self.chunk_size, self.chunk_mode = chunk_size, self.chunk_mode if chunk_mode is None else chunk_mode

    @property
    def grows(self) -> bool:  # type: ignore[override]
        """Whether each chunk has a memory of its own, which later chunks leave as it is."""
        return self.chunk_mode in ("independent", "growing")

    @property
    def max_chunk(self) -> int:
        """Longest chunk in tokens: the backbone's positions less the prefix."""
        return self.backbone.max_positions - self.prefix_length

    @property
    def max_chunks(self) -> int:
        """Most chunks with vectors of their own: these take at most half of the backbone's positions."""
        room = self.backbone.max_positions // 2 - (self.prefix_length - self.slots)
        return max(1, room // self.slots) if self.slots else 2**31 - 1

    @property
    def max_context(self) -> int:
        """Longest context in tokens: one chunk, `max_chunks` in a memory that grows, or no limit in the other modes."""
        if self.chunk_size is None:
            return self.max_chunk
        return self.chunk_size * self.max_chunks if self.grows else 2**31 - 1

    @property
    def max_query(self) -> int:
        """Most tokens of a query with its answer: the backbone's positions less the largest memory."""
        grows = self.chunk_size is not None and self.grows
        return super().max_query - (self.slots * (self.max_chunks - 1) if grows else 0)

    # WRITE

    def trajectory(self, context: Tokens, steps: int, *, until: float | None = None) -> Iterator[Written]:
        """Yield the memory before the first step and after every step; see `Method.trajectory`.

        Steps are counted for each chunk. Independent and joint chunks take each step together. A sequential chunk takes
        all of its steps before the next one begins, so there are more states. The loss of a step is the mean over the
        tokens of all chunks that took it, and `taken` is that of the chunk with the most steps.
        """
        self._check_write(context, steps)
        if self.chunk_size is None:
            yield from self.trajectory_from(context, self._start(len(context)), steps, until)
        elif self.chunk_mode == "independent":
            yield from self._independent(context, steps, until)
        else:
            yield from self._same_vectors(self._start(len(context)), context, steps, until)

    def at_steps(self, context: Tokens, steps: Sequence[int]) -> Iterator[tuple[int, Written]]:
        """Yield the memory after each of these numbers of steps on each chunk; see `Method.at_steps`.

        The start of a sequential chunk depends on the number of steps, so these are written anew for each number.
        """
        if self.chunk_size is None or self.chunk_mode not in ("sequential", "growing"):
            yield from super().at_steps(context, steps)
        else:
            yield from ((number, self.write(context, number)) for number in sorted(set(steps)))

    def extend(self, memory: Memory, context: Tokens, steps: int, *, until: float | None = None) -> Iterator[Written]:
        """Write more text into memories, as their next chunks; see `Method.extend`.

        With the mode "joint", only the new chunks are written jointly, starting from the given memory.
        """
        if self.chunk_mode == "independent":
            yield from self.trajectory(context, steps, until=until)
            return
        self._check_write(context, steps)
        counts = chunk_counts(memory)
        if not self.grows and bool((counts > 1).any()):
            raise GradmemError(
                "each chunk of this memory has vectors of its own: append with `chunk_mode: independent`"
            )
        like = self._start(1)
        last = counts.cumsum(0) - 1
        start = {n: tensor[last.to(tensor.device)].to(like[n]) for n, tensor in split_chunks(memory).tensors.items()}
        yield from self._same_vectors(start, context, steps, until)

    def merge(self, memory: Memory, more: Memory) -> Memory:
        """Combine a memory with what `extend` wrote; see `Method.merge`."""
        if not self.grows:
            return more
        counts, added = chunk_counts(memory), chunk_counts(more)
        self._check_chunks(counts + added)
        order = torch.cat([ragged_index(counts)[0], ragged_index(added)[0]]).argsort(stable=True)
        new = split_chunks(more).tensors
        old = split_chunks(memory).tensors
        tensors = {name: torch.cat([old[name], new[name]])[order.to(new[name].device)] for name in old}
        return pack(tensors, counts + added)

    def chunk_lengths(self, context: Tokens) -> list[list[int]]:
        """Count the tokens of each chunk of each context; an empty list for a context that is written whole."""
        if self.chunk_size is None:
            return super().chunk_lengths(context)
        chunks = self._cut(context)
        lengths = iter(chunks.tokens.lengths.tolist())
        return [[next(lengths) for _ in range(count)] for count in chunks.counts.tolist()]

    def _cut(self, context: Tokens) -> Chunks:
        ids = context.values.ids
        ends = torch.ones_like(ids, dtype=torch.bool) if self.task is None else self.task.may_end(ids)
        return Chunks.cut(context, self.chunk_size or ids.shape[1], ends)

    def _independent(self, context: Tokens, steps: int, until: float | None) -> Iterator[Written]:
        """Write independent chunks, step by step together."""
        chunks = self._cut(context)
        self._check_chunks(chunks.counts)
        # The caller limits the size of a batch, but one long context may have many chunks.
        size = self.backbone.contexts_at_once(chunks.tokens.ids.shape[1])
        size = len(chunks.rows) if torch.is_grad_enabled() else size
        tokens = [chunks.tokens[i : i + size] for i in range(0, len(chunks.rows), size)]
        trajectories = [self.trajectory_from(some, self._start(len(some)), steps, until) for some in tokens]
        for states in _together(trajectories):
            names = states[0].memory.tensors
            tensors = {name: torch.cat([state.memory.tensors[name] for state in states]) for name in names}
            parts = [_Part(*part) for part in zip(tokens, chunks.rows.split(size), states, strict=True)]
            yield Written(pack(tensors, chunks.counts), *_summed(parts, len(context)))

    def _same_vectors(self, start: Tensors, context: Tokens, steps: int, until: float | None) -> Iterator[Written]:
        """Write chunks into the same vectors, sequentially or jointly."""
        if self.chunk_mode in ("sequential", "growing"):
            yield from self._sequential(context, start, steps, until)
        else:
            chunks = self._cut(context)
            yield from self.joint_trajectory(chunks.tokens, chunks.rows, start, steps, until)

    def _sequential(self, context: Tokens, tensors: Tensors, steps: int, until: float | None) -> Iterator[Written]:
        """Write the first chunks of all contexts, then the second ones of those that have one, and so on."""
        chunks, done, kept = self._cut(context), list[_Part](), list[tuple[Tensor, Tensors]]()
        if self.grows:
            self._check_chunks(chunks.counts)
        last, of_context = int(chunks.counts.max()) - 1, ragged_index(chunks.counts)
        for turn in range(last + 1):
            mine = (of_context[1] == turn).nonzero()[:, 0]
            tokens, rows = chunks.tokens[mine], of_context[0][mine].to(chunks.rows.device, non_blocking=True)
            before, states, number = tensors, list[_Part](), 0
            start = {name: tensor[rows] for name, tensor in before.items()}
            for number, written in enumerate(self.trajectory_from(tokens, start, steps, until, more=turn < last)):
                tensors = {name: new.index_copy(0, rows, written.memory.tensors[name]) for name, new in before.items()}
                states = [_Part(tokens, rows, written)]
                memory = Memory(tensors)
                if self.grows:
                    memory = _grown([*kept, (of_context[0][mine], written.memory.tensors)], len(context))
                result = Written(memory, *_summed(done + states, len(context)))
                if number or not turn:
                    yield result
            if self.grows and turn and not number:
                yield result  # although no step was taken, there is one more memory
            kept.append((of_context[0][mine], written.memory.tensors))
            done += states

    def _check_chunks(self, counts: Tensor) -> None:
        most = int(counts.max())
        if most > self.max_chunks:
            raise GradmemError(
                f"a context has {most} chunks; the limit is {self.max_chunks}: raise `chunk_size`, or set "
                "`chunk_mode: sequential`"
            )

    # READ and receipts

    def prefix(self, memory: Memory) -> Prefix:
        """Run what READ places before a query, once for each row."""
        if self.form is None or LENGTHS not in memory.tensors:
            return super().prefix(memory)
        return self.form.prefix(self.backbone, split_chunks(memory).tensors, chunk_counts(memory))

    def inputs(self, memory: Memory) -> tuple[Tensor, Tensor]:
        """Build `[read_start ; P(M) of each chunk ; read_end]` of each row; see `PrefixMethod.inputs`."""
        if LENGTHS not in memory.tensors:
            return super().inputs(memory)
        counts = chunk_counts(memory)
        embeds = pad_rows(self._project("read", split_chunks(memory).tensors), counts).flatten(1, 2)
        real = torch.arange(embeds.shape[1]) < counts[:, None] * self.n_mem
        if self.control:
            start, end = (self.control[f"read_{side}"].expand(len(memory), -1, -1) for side in ("start", "end"))
            embeds, real = torch.cat([start, embeds, end], 1), F.pad(real, (self.n_ctrl, self.n_ctrl), value=True)
        return pads_last(embeds, real.to(embeds.device, non_blocking=True)), real.sort(1, descending=True).values

    def token_losses(self, memory: Memory, context: Tokens) -> Tensor:
        """Compute the loss of each context token given a memory, chunk by chunk: shape (batch, length), in nats.

        If each chunk of the memory has vectors of its own, its first chunks are those of the context.
        """
        if self.chunk_size is None and LENGTHS not in memory.tensors:
            return super().token_losses(memory, context)
        chunks = self._cut(context)
        if LENGTHS in memory.tensors:
            own = {n: t[chunks.rows, chunks.chunk_index] for n, t in memory.tensors.items() if n != LENGTHS}
        else:
            own = {n: t[chunks.rows] for n, t in memory.tensors.items()}
        losses = super().token_losses(Memory(own), chunks.tokens)
        return chunks.rejoined(losses, context)

    def reconstruct(self, memory: Memory, lengths: Sequence[int]) -> list[list[int]]:
        """Reconstruct chunks: one row of tokens for each chunk that has vectors; see `Method.reconstruct`."""
        return super().reconstruct(split_chunks(memory), lengths)

    def split_chunks(self, memory: Memory) -> Memory:
        """Make each chunk that has vectors of its own a row; see `Method.split_chunks`."""
        return split_chunks(memory)

    def vectors(self, memory: Memory) -> int:
        """Count the memory vectors of all rows."""
        return int(chunk_counts(memory).sum()) * self.n_mem

    def check(self, memory: Memory, what: str) -> None:
        """Raise `GradmemError` unless the memory has the tensors and shapes that this method writes."""
        lengths, own = memory.tensors.get(LENGTHS), [t for name, t in memory.tensors.items() if name != LENGTHS]
        if lengths is not None and own:
            most = min(self.max_chunks, *(tensor.shape[1] if tensor.ndim > 1 else 0 for tensor in own))
            real = lengths.ndim == 1 and not lengths.is_floating_point()
            if not real or not bool(((lengths >= 1) & (lengths <= most)).all()):
                shapes = {name: tuple(tensor.shape[1:]) for name, tensor in memory.tensors.items()}
                raise GradmemError(f"{what} holds {shapes}, which are not 1 to {self.max_chunks} chunks a row")
            memory = split_chunks(memory)
        super().check(memory, what)


@dataclass
class _Part:
    """Chunks that are written at the same time, and the contexts that they belong to."""

    tokens: Tokens
    rows: Tensor
    written: Written


def _grown(kept: list[tuple[Tensor, Tensors]], batch: int) -> Memory:
    """Build memories from the chunks of each turn: their contexts, int64 on the CPU, and what was written of them."""
    rows = torch.cat([own for own, _ in kept])
    order = rows.argsort(stable=True)
    names = kept[0][1]
    tensors = {name: torch.cat([own[name] for _, own in kept]) for name in names}
    tensors = {name: tensor[order.to(tensor.device)] for name, tensor in tensors.items()}
    return pack(tensors, rows.bincount(minlength=batch))


def _together(trajectories: Sequence[Iterator[Written]]) -> Iterator[list[Written]]:
    """Yield the states of several trajectories after the same number of steps; one that has ended keeps its last."""
    states = [next(one) for one in trajectories]
    news: list[Written | None] = [*states]
    while any(news):
        states = [new or state for new, state in zip(news, states, strict=True)]
        yield states
        news = [next(one, None) for one in trajectories]


def _summed(parts: list[_Part], batch: int) -> tuple[Tensor, Tensor]:
    """Combine parts: mean loss over the tokens of the chunks that took a step (steps, batch), most steps (batch,)."""
    like = parts[0].written.losses
    total = like.new_zeros(max(len(part.written.losses) for part in parts), batch)
    weight, most = torch.zeros_like(total), parts[0].written.taken.new_zeros(batch)
    for part in parts:
        losses, taken = part.written.losses, part.written.taken
        steps = torch.arange(len(losses), device=losses.device)
        tokens = (steps[:, None] < taken) * part.tokens.lengths
        missing = (0, 0, 0, len(total) - len(losses))
        total = total.index_add(1, part.rows, F.pad(losses * tokens, missing))
        weight = weight.index_add(1, part.rows, F.pad(tokens.to(weight.dtype), missing))
        most = most.scatter_reduce(0, part.rows, taken, "amax")
    return total / weight.clamp_min(1), most
