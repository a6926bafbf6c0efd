"""What a memory method is: WRITE a context into a memory, READ answers from the memory alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...backbone import Backbone
from ...batch import Batch, Tokens
from ...errors import GradmemError
from ...inner.meta_gradient import Strategy
from ...inner.objective import sample_losses, token_losses
from ...memory import Memory
from ...prefix import Prefix, generate
from ...probing import other_layers

Mode = Literal["sequential", "independent", "joint"]
"""How the chunks of a context are written into one memory; see `ChunkedMethod`."""


@dataclass
class Written:
    """What a WRITE returns.

    Attributes
    ----------
    memory : Memory, one row for each context
    losses : Tensor, shape (steps, batch)
        Write loss of each sample before each step, differentiable in training. Empty for methods without one.
    taken : Tensor, int64, shape (batch,)
        Steps that each sample took.
    """

    memory: Memory
    losses: Tensor
    taken: Tensor

    def rows(self) -> list[Written]:
        """Each context's own."""
        columns = zip(self.losses.split(1, 1), self.taken.split(1), strict=True)
        return [Written(self.memory[row], *own) for row, own in enumerate(columns)]


def anywhere(ids: Tensor) -> Tensor:
    """A text without parts that must stay whole: it may be cut after every token."""
    return torch.ones_like(ids, dtype=torch.bool)


def last_state(trajectory: Iterable[Written]) -> Written:
    """The end of a trajectory; of the way there nothing is kept, which may be hundreds of memories."""
    return deque(trajectory, maxlen=1).pop()


class Method(nn.Module, ABC):
    """Base of all memory methods.

    A method is one file in `gradmem/methods/` with one subclass of this. It implements `trajectory` and `prefix`;
    writing, reading and generating are built on these.

    Parameters
    ----------
    backbone : Backbone

    Raises
    ------
    GradmemError
        When the backbone keeps recurrent states and the method reads through keys and values.
    """

    needs_kv_cache = True
    """Whether the method reads through keys and values, as a backbone of attention layers keeps them."""

    write_steps: int
    """Number of write steps when the caller does not say."""
    reconstruction: bool = False
    """Whether training also learns to reconstruct the context from the written memory, weighted as the write loss."""
    strategy: Strategy = "recompute"
    """How gradients pass through WRITE: a choice of time and memory that changes no result. Methods that know one
    way only ignore it."""
    runtime_options: Sequence[str] = ()
    """Attributes that change how it writes, not what its weights are, and may be set at any time."""
    joins: bool = False
    """Whether it can write the chunks of a context into one memory; where not, each takes a memory of its own."""
    caution: str = ""
    """What its memories are not good for, for whoever might expect it."""
    chunk_size: int | None = None
    """Most tokens of a chunk; None where contexts are written whole. Set it by `chunk_by`."""
    chunk_mode: Mode = "sequential"
    """Whether each chunk is written from the memory that the one before it left, gets vectors of its own, or takes
    every step together with the others."""
    may_end: Callable[[Tensor], Tensor] = staticmethod(anywhere)
    """Tokens after which a chunk may end, from ids, as `Task.may_end` says; `MemoryModel` puts its task's here."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        if self.needs_kv_cache and not backbone.attends:
            kind, layers = backbone.model.config.model_type, ", ".join(other_layers(backbone))
            raise GradmemError(
                f"this method reads through keys and values, and '{kind}' has layers that keep something else "
                f"({layers}): take an attention model as backbone, like `model_type: llama`"
            )
        self.backbone = backbone

    @abstractmethod
    def trajectory(self, context: Tokens, steps: int, *, until: float | None = None) -> Iterator[Written]:
        """Yield the memory before the first write step and after every step.

        Gradients flow as the method defines while `torch.is_grad_enabled()`; otherwise nothing is kept for them.
        Between two steps other memories may be read: whatever is switched in the model must be switched back by then.

        Parameters
        ----------
        context : Tokens, shape (batch, length)
        steps : int
        until : float, optional
            A sample whose write loss is at most this takes no further step.

        Raises
        ------
        GradmemError
            When steps are negative, a context is empty or too long, or `until` is given to a method without write
            loss.
        """

    @abstractmethod
    def prefix(self, memory: Memory) -> Prefix:
        """Run what READ puts before a query, once for each row of the memory."""

    def token_losses(self, memory: Memory, context: Tokens) -> Tensor:
        """Loss of each context token when the context is reconstructed from the memory, shape (batch, length), nats.

        Here the context is read like a query.
        """
        given = Tokens(context.ids[:, :-1], context.mask[:, :-1])
        return token_losses(self.read_hidden(self.prefix(memory), given), self.backbone.head, context.ids, context.mask)

    def write_loss(self, written: Written, context: Tokens) -> Tensor:
        """Loss of WRITE that training may add to the loss of READ: a scalar, zero for methods without one.

        Here averaged over samples: with `reconstruction` the loss of the context under the written memory, one more
        pass; without, the last of the write losses, which is of the memory before the last step.

        Parameters
        ----------
        written : Written
            What writing `context` returned.
        context : Tokens, shape (batch, length)
        """
        if self.reconstruction:
            return sample_losses(self.token_losses(written.memory, context), context.mask).mean()
        return written.losses[-1].mean() if len(written.losses) else written.losses.new_zeros(())

    @property
    @abstractmethod
    def max_context(self) -> int:
        """Longest context in tokens."""

    @property
    def too_long_advice(self) -> str:
        """What to do with longer contexts, for the end of an error message."""
        return ": write them in chunks (option `chunk_size`)" if self.joins and self.chunk_size is None else ""

    @property
    def max_chunk(self) -> int:
        """Most tokens that are written together."""
        return self.max_context

    @property
    def max_query(self) -> int:
        """Longest query and answer in tokens."""
        return self.max_context

    def inner_lrs(self) -> list[float]:
        """Inner learning rates for the record; empty for methods without."""
        return []

    def inner_parameters(self) -> list[nn.Parameter]:
        """What is learned of the write's own optimiser, for a learning rate of its own; empty for methods without."""
        return []

    @abstractmethod
    def check(self, memory: Memory, what: str) -> None:
        """Raise `GradmemError` when the tensors of a memory are not what this method writes."""

    @property
    def n_mem(self) -> int:
        """Number of memory vectors; 0 where the memory is something else."""
        return 0

    def write(self, context: Tokens, steps: int | None = None, *, until: float | None = None) -> Written:
        """Write contexts into memories; the arguments are those of `trajectory`."""
        return last_state(self.trajectory(context, self.write_steps if steps is None else steps, until=until))

    def at_steps(self, context: Tokens, steps: Sequence[int]) -> Iterator[tuple[int, Written]]:
        """Yield the memory after each of several numbers of steps, in rising order; here off one trajectory.

        Methods that take fewer steps leave out the numbers beyond.
        """
        for number, written in enumerate(self.trajectory(context, max(steps))):
            if number in steps:
                yield number, written

    # Chunks: what only methods that write several into one memory (`joins`) have more to say about

    def chunk_by(self, chunk_size: int | None, chunk_mode: Mode | None = None) -> None:
        """Choose how contexts are cut from now on; memories written before are read as ever.

        Parameters
        ----------
        chunk_size : int or None
            Most tokens of a chunk; None to write contexts whole.
        chunk_mode : {"sequential", "independent", "joint"}, optional
            By default as before.

        Raises
        ------
        GradmemError
            When a chunk is too long, or the method writes contexts whole only.
        """
        raise self._whole_only()

    def chunk_lengths(self, context: Tokens) -> list[list[int]]:
        """Tokens of each chunk of each context; none for contexts that are written whole."""
        return [[] for _ in range(len(context))]

    def extend(self, memory: Memory, context: Tokens, steps: int, *, until: float | None = None) -> Iterator[Written]:
        """Write more into memories: yield what is written, before the first step and after every step.

        Parameters
        ----------
        memory : Memory
            One row for each context.
        context, steps, until
            As for `trajectory`.

        Raises
        ------
        GradmemError
            As `trajectory`, and when the method or the memory allows no more.
        """
        raise self._whole_only()

    def merge(self, memory: Memory, more: Memory) -> Memory:
        """Put together a memory and the last that `extend` wrote into it."""
        raise self._whole_only()

    def split_chunks(self, memory: Memory) -> Memory:
        """The chunks that have tensors of their own as rows of their own; here a row is one chunk."""
        return memory

    def vectors(self, memory: Memory) -> int:
        """Memory vectors of all rows."""
        return len(memory) * self.n_mem

    def _whole_only(self) -> GradmemError:
        name = type(self).__name__
        return GradmemError(f"{name} writes contexts whole, at once: give it all text together, or take gradmem or rmt")

    def read_hidden(self, prefix: Prefix, queries: Tokens) -> Tensor:
        """Hidden states that predict: row t predicts query token t, the last row what follows.

        Where nothing predicts the first token of a query, which is never a target, its row is zeros.

        Parameters
        ----------
        prefix : Prefix
            One row for each query.
        queries : Tokens, shape (queries, length)

        Returns
        -------
        Tensor, shape (queries, length + 1, d)
        """
        if prefix.mask is not None and not self.backbone.batches_uneven:
            return self._read_by_length(prefix, queries)
        with prefix.active():
            embeds = self.backbone.embed(queries.ids)
            hidden = self.backbone.hidden(embeds, prefix.cache, **prefix.continued(embeds.shape[1]))
        return torch.cat([prefix.last[:, None], hidden], dim=1)

    def read(self, memory: Memory, queries: Tokens, rows: Tensor | None = None) -> Tensor:
        """Logits of query tokens given the memory: row t predicts query token t, the last row what follows.

        Parameters
        ----------
        memory : Memory
        queries : Tokens, shape (queries, length)
        rows : Tensor, int64, shape (queries,), optional
            Memory row that each query asks; by default query i asks row i.

        Returns
        -------
        Tensor, shape (queries, length + 1, vocabulary)
        """
        return self.backbone.head(self.read_hidden(self._prefix_rows(memory, rows), queries))

    def read_targets(self, memory: Memory, batch: Batch) -> Tensor:
        """Logits at the target tokens only, in order.

        Parameters
        ----------
        memory : Memory
        batch : Batch
            Its queries ask the memory's rows `batch.rows`.

        Returns
        -------
        Tensor, shape (targets, vocabulary)
        """
        hidden = self.read_hidden(self._prefix_rows(memory, batch.rows), batch.queries)
        return self.backbone.head(hidden[:, :-1].flatten(0, 1)[batch.targets])

    def generate(
        self,
        memory: Memory | Prefix,
        queries: list[list[int]],
        rows: Tensor | None = None,
        *,
        pad_id: int = 0,
        **options: Any,
    ) -> list[list[int]]:
        """Generate the continuation of each query; `options` are those of `generate` that `prefix.OPTIONS` names.

        Nothing is taken from the model's own generation config, so that only a given `eos_token_id` ends an answer.

        Parameters
        ----------
        memory : Memory or Prefix
            A prefix that has been run can be given again, for memories that are asked often.
        queries : list of list of int
            Token ids, at least one each.
        rows : Tensor, int64, shape (queries,), optional
            Memory row that each query asks; by default query i asks row i.

        Returns
        -------
        list of list of int
            The new tokens of each query, or of each of its sequences (`num_return_sequences`) one after the other.

        Raises
        ------
        GradmemError
            When a query is empty, or there are other options.
        """
        if not all(queries):
            raise GradmemError("a query is empty")
        if not queries:
            return []
        with torch.no_grad():
            prefix = memory if isinstance(memory, Prefix) else self.prefix(memory)
            return self._continue(prefix if rows is None else prefix.select(rows), queries, pad_id, options)

    @torch.no_grad()
    def reconstruct(self, memory: Memory, lengths: Sequence[int]) -> list[list[int]]:
        """Read contexts back from their memories, always the likeliest next token: what `token_losses` measures.

        Where no token of a context has a loss beyond ln 2, this gives the context exactly: each token is then
        likelier than all others together.

        Parameters
        ----------
        memory : Memory
        lengths : sequence of int
            Tokens to read back from each row, at least 1.
        """
        prefix = self.prefix(memory)
        every = torch.arange(len(memory), device=prefix.last.device)
        ids = self.backbone.head(prefix.last).argmax(-1, keepdim=True)
        while ids.shape[1] < max(lengths):
            # From the start each time: what a method keeps of tokens that were read is its own affair.
            hidden = self.read_hidden(prefix.select(every), Tokens(ids, torch.ones_like(ids, dtype=torch.bool)))
            ids = torch.cat([ids, self.backbone.head(hidden[:, -1:]).argmax(-1)], dim=1)
        return [row[:length] for row, length in zip(ids.tolist(), lengths, strict=True)]

    def _check_write(self, context: Tokens, steps: int) -> None:
        """Refuse negative steps, and contexts that are empty or too long."""
        if steps < 0:
            raise GradmemError(f"write steps must be at least 0, not {steps}")
        if context.ids.shape[1] > self.max_context:
            raise GradmemError(
                f"a context has {context.ids.shape[1]} tokens; the limit is {self.max_context}{self.too_long_advice}"
            )
        mask = context.values.mask
        if not mask.numel() or not mask[:, :1].all():
            raise GradmemError("a context is empty")

    def _refuse_until(self, until: float | None) -> None:
        """Refuse `until`, for methods without a write loss that could reach it."""
        if until is not None:
            raise GradmemError("`until` needs a write loss, which this method has not: give a number of `steps`")

    def _compare(self, memory: Memory, own: Memory, what: str) -> None:
        """Refuse a memory whose tensors have other names or shapes than one of this method's own."""
        found, wanted = ({name: tuple(t.shape[1:]) for name, t in m.tensors.items()} for m in (memory, own))
        if found != wanted:
            raise GradmemError(f"{what} holds {found}, this method writes {wanted}")

    def _read_by_length(self, prefix: Prefix, queries: Tokens) -> Tensor:
        """Read after prefixes of one length at a time, without their pads."""
        lengths = torch.tensor(prefix.lengths, device=prefix.last.device)
        groups = [(lengths == length).nonzero()[:, 0] for length in lengths.unique()]
        hidden = torch.cat([self.read_hidden(prefix.cut(rows), queries[rows]) for rows in groups])
        return hidden[torch.cat(groups).argsort()]

    def _prefix_rows(self, memory: Memory, rows: Tensor | None) -> Prefix:
        prefix = self.prefix(memory)
        return prefix if rows is None else prefix.select(rows)

    def _continue(
        self, prefix: Prefix, queries: list[list[int]], pad_id: int, options: dict[str, Any]
    ) -> list[list[int]]:
        """Generate after a prefix with one row for each query; see `generate`."""
        return generate(self.backbone, prefix, queries, pad_id, **options)
