"""The interface of a memory method: WRITE a context into a memory, READ answers from the memory alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...backbone import Backbone
from ...batch import Batch, Tokens
from ...errors import GradmemError
from ...generation import generate
from ...inner.meta_gradient import Strategy
from ...inner.objective import sample_losses, token_losses
from ...memory import Memory
from ...prefix import Prefix
from ...probing import other_layers
from .chunks import ChunkMode
from .whole_contexts import WholeContexts
from .written import Written, last_state


class Method(WholeContexts, ABC):
    """Base of all memory methods.

    A method is one file in `gradmem/methods/` with one subclass of this. It implements `trajectory`, `prefix`,
    `max_context` and `check`; writing, reading and generating are built on these.

    Parameters
    ----------
    backbone : Backbone

    Raises
    ------
    GradmemError
        If the method reads through keys and values and the backbone keeps recurrent states.
    """

    needs_kv_cache = True
    """Whether the method reads through keys and values, which only attention layers keep."""

    write_steps: int
    """Default number of write steps."""
    reconstruction: bool = False
    """Whether training also learns to reconstruct the context from the written memory, weighted as the write loss."""
    strategy: Strategy = "recompute"
    """How gradients pass through WRITE. It changes time and memory but no result; see `gradmem.inner.descend`. Methods
    that have only one way ignore it."""
    runtime_options: Sequence[str] = ()
    """Names of options that do not depend on the weights; they are attributes that may be set at any time."""
    reads_together: bool = False
    """Whether the rows of a memory are chunks of one document, which a question reads together."""
    questions: Sequence[str] | None = None
    """The user's own questions about the next texts; None if the method does not fit memories to questions."""
    joins: bool = False
    """Whether several chunks of a context can be written into one memory; if not, each needs a memory of its own."""
    caution: str = ""
    """A warning to users about what the memories cannot do."""
    chunk_size: int | None = None
    """Most tokens of a chunk; None if contexts are written whole. Set it with `chunk_by`."""
    chunk_mode: ChunkMode = "sequential"
    """How the chunks of a context are written into one memory; see `ChunkedMethod`. Set it with `chunk_by`."""
    grows: bool = False
    """Whether each chunk has a memory of its own, which later chunks leave as it is."""
    task_name: str = "raw_text"
    """The task through which a plain language model is read with this method: `document` if it answers questions."""
    task: Any = None
    """The task, which encodes texts and questions and says where a chunk may end; `MemoryModel` sets it."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        if self.needs_kv_cache and not backbone.attends:
            kind, layers = backbone.model.config.model_type, ", ".join(other_layers(backbone))
            raise GradmemError(
                f"this method reads through keys and values, and '{kind}' has layers that keep something else "
                f"({layers}): take an attention model as backbone, like `model_type: llama`"
            )
        self.backbone = backbone

    @classmethod
    def variant(cls, options: dict[str, Any]) -> type[Method]:
        """The class that serves a method's options: this one, unless a method has several."""
        return cls

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def before_context(self) -> list[int]:
        """Token ids that the task puts before every context; see `Task.before_context`."""
        return [] if self.task is None else list(self.task.before_context)

    @abstractmethod
    def trajectory(self, context: Tokens, steps: int, *, until: float | None = None) -> Iterator[Written]:
        """Yield the memory before the first write step and after every step.

        The method defines how gradients flow if `torch.is_grad_enabled()`; otherwise no graph is kept. Other memories
        may be read between two steps, so the model must be as before whenever this yields.

        Parameters
        ----------
        context : Tokens, shape (batch, length)
        steps : int
        until : float, optional
            A sample whose write loss is at most this takes no further step.

        Raises
        ------
        GradmemError
            If steps are negative, a context is empty or too long, or `until` is given and the method has no write
            loss.
        """

    @abstractmethod
    def prefix(self, memory: Memory) -> Prefix:
        """Run what READ places before a query, once for each row of the memory."""

    def token_losses(self, memory: Memory, context: Tokens) -> Tensor:
        """Compute the loss of each context token given the memory: shape (batch, length), in nats.

        By default the context is read like a query.
        """
        given = Tokens(context.ids[:, :-1], context.mask[:, :-1])
        return token_losses(self.read_hidden(self.prefix(memory), given), self.backbone.head, context.ids, context.mask)

    def write_loss(self, written: Written, context: Tokens) -> Tensor:
        """Compute the loss of WRITE that training may add to the loss of READ: a scalar, zero if there is none.

        By default it is a mean over samples: with `reconstruction` of the loss of the context given the written
        memory, which takes one more pass; without it of the last write loss, that of the memory before the last step.

        Parameters
        ----------
        written : Written
            The result of writing `context`.
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
        """The end of an error message that says what to do about a context that is too long."""
        return ": write them in chunks (option `chunk_size`)" if self.joins and self.chunk_size is None else ""

    @property
    def max_chunk(self) -> int:
        """Most tokens that are written at once."""
        return self.max_context

    @property
    def max_query(self) -> int:
        """Longest query and answer in tokens."""
        return self.max_context

    def texts_at_once(self, length: int) -> int:
        """Texts of so many tokens that are written in one batch."""
        return self.backbone.contexts_at_once(length)

    def inner_lrs(self) -> list[float]:
        """Return the inner learning rates for the receipt; empty if the method has none."""
        return []

    def inner_parameters(self) -> list[nn.Parameter]:
        """Return the learned parameters of the inner optimizer, which may have a learning rate of their own."""
        return []

    @abstractmethod
    def check(self, memory: Memory, what: str) -> None:
        """Raise `GradmemError` unless the tensors of a memory have the names and shapes that this method writes."""

    def notes(self, memory: Memory) -> list[str]:
        """What to tell whoever has just written a memory: `caution`, if there is one."""
        return [self.caution] if self.caution else []

    @property
    def n_mem(self) -> int:
        """Number of memory vectors; 0 if the memory is not made of vectors."""
        return 0

    def vectors(self, memory: Memory) -> int:
        """Count the memory vectors of all rows."""
        return len(memory) * self.n_mem

    def without_text(self, rows: int) -> Memory | None:
        """Memories of no text, for the control; None if those are the memories before the first write step."""
        return None

    def write(self, context: Tokens, steps: int | None = None, *, until: float | None = None) -> Written:
        """Write contexts into memories; see `trajectory` for the arguments."""
        return last_state(self.trajectory(context, self.write_steps if steps is None else steps, until=until))

    def at_steps(self, context: Tokens, steps: Sequence[int]) -> Iterator[tuple[int, Written]]:
        """Yield the memory after each of several numbers of steps, in rising order, by default from one trajectory.

        Numbers that the method does not reach are left out.
        """
        for number, written in enumerate(self.trajectory(context, max(steps))):
            if number in steps:
                yield number, written

    def read_hidden(self, prefix: Prefix, queries: Tokens) -> Tensor:
        """Compute the hidden states that predict: row t predicts query token t, the last row the next token.

        The first row is zero if the prefix has no position that could predict the first token of a query.

        Parameters
        ----------
        prefix : Prefix
            One row for each query.
        queries : Tokens, shape (queries, length)

        Returns
        -------
        Tensor, shape (queries, length + 1, d)
        """
        if not queries.ids.shape[1]:  # models fail on inputs without tokens
            return prefix.last[:, None]
        if prefix.mask is not None and not self.backbone.batches_uneven:
            return self._read_by_length(prefix, queries)
        with prefix.active():
            embeds = self.backbone.embed(queries.ids)
            hidden = self.backbone.hidden(embeds, prefix.cache, **prefix.continued(embeds.shape[1]))
        return torch.cat([prefix.last[:, None], hidden], dim=1)

    def read(self, memory: Memory, queries: Tokens, rows: Tensor | None = None) -> Tensor:
        """Compute logits given the memory: row t predicts query token t, the last row the next token.

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
        """Compute the logits of the target tokens only, in order.

        Parameters
        ----------
        memory : Memory
        batch : Batch
            Query i asks row `batch.rows[i]` of the memory.

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
        """Generate a continuation of each query.

        The model's own generation config is ignored: an answer only ends at a given `eos_token_id`.

        Parameters
        ----------
        memory : Memory or Prefix
            A memory, or its prefix that was run before.
        queries : list of list of int
            Token ids, at least one each.
        rows : Tensor, int64, shape (queries,), optional
            Memory row that each query asks; by default query i asks row i.
        pad_id : int
            Token id of pads.
        **options
            The options of transformers' generation that `gradmem.generation.OPTIONS` names.

        Returns
        -------
        list of list of int
            The new tokens of each query; with `num_return_sequences`, of each sequence of each query.

        Raises
        ------
        GradmemError
            If a query is empty, or an option is not allowed.
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
        """Reconstruct contexts from their memories by greedy decoding, under the probabilities of `token_losses`.

        A context is reconstructed exactly if no token has a loss above ln 2: each token is then more likely than all
        others together.

        Parameters
        ----------
        memory : Memory
        lengths : sequence of int
            Number of tokens to reconstruct from each row, at least 1.
        """
        prefix = self.prefix(memory)
        every = torch.arange(len(memory), device=prefix.last.device)
        ids = self.backbone.head(prefix.last).argmax(-1, keepdim=True)
        while ids.shape[1] < max(lengths):
            # Each token is read from the start again, because a method's prefix may not be extended in place.
            hidden = self.read_hidden(prefix.select(every), Tokens(ids, torch.ones_like(ids, dtype=torch.bool)))
            ids = torch.cat([ids, self.backbone.head(hidden[:, -1:]).argmax(-1)], dim=1)
        return [row[:length] for row, length in zip(ids.tolist(), lengths, strict=True)]

    def repeat_losses(self, prefix: Prefix, context: Tokens, query: list[int]) -> Tensor:
        """Compute the loss of each token of a text as the answer to a query, after the prefix of its memory.

        Parameters
        ----------
        prefix : Prefix
        context : Tokens, shape (batch, length)
        query : list of int
            Token ids that ask for the text.

        Returns
        -------
        Tensor, shape (batch, length), nats
        """
        asked = torch.tensor(query, dtype=torch.long, device=context.ids.device).expand(len(context), -1)
        ids = torch.cat([asked, context.ids[:, :-1]], 1)
        mask = torch.cat([torch.ones_like(asked, dtype=torch.bool), context.mask[:, :-1]], 1)
        hidden = self.read_hidden(prefix, Tokens(ids, mask))[:, len(query) :]
        return token_losses(hidden, self.backbone.head, context.ids, context.mask)

    def repeat(self, memory: Memory, lengths: Sequence[int], query: list[int]) -> list[list[int]]:
        """Let the model answer a query with so many tokens of each row, by greedy decoding."""
        found: list[list[int]] = []
        for row, length in enumerate(lengths):
            options: dict[str, Any] = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False}
            found += self.generate(memory[row], [query], pad_id=self.task.pad_id, **options)
        return found

    def _check_write(self, context: Tokens, steps: int) -> None:
        """Raise `GradmemError` if steps are negative or a context is empty or too long."""
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
        """Raise `GradmemError` if `until` is given, for methods without a write loss."""
        if until is not None:
            raise GradmemError("`until` needs a write loss, and this method has none: give a number of `steps`")

    def _read_by_length(self, prefix: Prefix, queries: Tokens) -> Tensor:
        """Read after prefixes of one length at a time, with their pads removed."""
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
        """Generate after a prefix that has one row for each query; see `generate`."""
        return generate(self.backbone, prefix, queries, pad_id, **options)
