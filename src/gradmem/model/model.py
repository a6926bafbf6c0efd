"""Models that write memories, and the memories that are bound to them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ..errors import GradmemError
from ..memory import Memory
from ..prefix import Prefix
from ..progress import Progress, silent
from ..receipts import Author
from ..untrusted import check_counts
from . import checkpoint, reading, writing
from .checkpoint_model import CheckpointModel
from .reading import Answer


class MemoryModel(
    CheckpointModel,
    library_name="gradmem",
    tags=["memory", "test-time-training"],
    model_card_template=checkpoint.MODEL_CARD,
):
    """A memory method with the task that it was trained on: write memories, open and bind them, save and load.

    Parameters
    ----------
    method : Method
    task : Task
    spec : dict
        `task`, `backbone` and `method` as plain data, from which the same objects can be built.
    name : str
        Name or path by which `gradmem.load` finds it.
    """

    @property
    def appends(self) -> bool:
        """Whether it was trained to append: on contexts in chunks, written in the way in which it writes them now."""
        trained, mode = self.spec["method"], self.method.chunk_mode
        cut = trained.get("chunk_size") is not None and trained.get("chunk_mode", "sequential") == mode
        return cut and mode != "joint"

    def write(
        self,
        text: str | Sequence[str],
        steps: int | None = None,
        *,
        until: float | None = None,
        max_steps: int | None = None,
        questions: Sequence[str] = (),
        progress: Progress = silent,
    ) -> BoundMemory:
        """Write one text, or several at once, into a memory each.

        Parameters
        ----------
        text : str or sequence of str
        steps : int, optional
            Write steps; by default as many as the checkpoint was trained with.
        until : float, optional
            Instead of a number of steps: stop each text at this write loss (mean nats per token).
        max_steps : int, optional
            Most steps that `until` may take; by default 30, or the method's own number if that is larger.
        questions : sequence of str
            Your own questions, for a method that fits memories to questions (`compact`). Every fourth only measures.
        progress : callable
            See `gradmem.progress.Progress`.

        Returns
        -------
        BoundMemory
            One row for each text, each with a `Receipt`.

        Raises
        ------
        GradmemError
            If a text is empty, too long or has unknown characters, the number of steps is negative, or the questions
            are in another language or the method takes none.
        """
        most, texts = self.most_steps(steps, until, max_steps), writing.as_texts(text)
        with writing.asking(self.method, questions, texts):
            return self._write(texts, None, most, until, progress)

    def append(
        self,
        memory: Memory,
        text: str | Sequence[str],
        steps: int | None = None,
        *,
        before: str | Sequence[str] | None = None,
        may_forget: bool = False,
        until: float | None = None,
        max_steps: int | None = None,
        progress: Progress = silent,
    ) -> BoundMemory:
        """Write more text into a memory, as the next chunk of what was written.

        With `chunk_mode: independent` the text gets vectors of its own, which READ sees beside the others; otherwise
        WRITE continues from the memory as it is. Both must be learned: a checkpoint that was not trained on chunks in
        this way (see `appends`) loses nearly everything that was written before.

        Parameters
        ----------
        memory : Memory
            Written by this model; it is unchanged.
        text : str or sequence of str
            One for each row.
        steps, until, max_steps, progress
            As for `write`.
        before : str or sequence of str, optional
            For each row the earlier text (all earlier texts, one after the other, or one of them), to measure what the
            memory still keeps of it. Without it the receipt says that this was not measured.
        may_forget : bool
            Append even if the checkpoint was never trained to.

        Returns
        -------
        BoundMemory
            Its receipts are of the new texts; their `earlier` has those of the texts before.

        Raises
        ------
        GradmemError
            As for `write`; if another model wrote the memory, the method takes no more text, the checkpoint was never
            trained to append, or `before` is not what was written.
        """
        memory = self.bind(memory)
        if not self.method.joins:
            raise GradmemError(f"'{self.name}' cannot append: write all text at once")
        if not self.appends and not may_forget:
            raise GradmemError(
                f"'{self.name}' was never trained to append, and would forget most of what was written: write all text "
                "at once, or allow it to forget (`may_forget`) and measure what is left (`before`)"
            )
        texts = writing.as_texts(text, memory)
        told = None if before is None else writing.as_texts(before, memory, "`before` has")
        for row, given in enumerate(told or ()):
            kept = sum(min(len(part.token_losses), self.method.max_context) for part in memory.receipts[row].history)
            if len(given) > self.encoder.most_characters(kept):
                raise GradmemError("`before` is not the text that was written")
        appended = self._write(texts, memory, self.most_steps(steps, until, max_steps), until, progress)
        if told is not None:
            appended.receipts = [
                writing.measure_again(self.method, self.task, appended[row], text, self.encoder.context_ids)
                for row, text in enumerate(told)
            ]
        return appended

    def _write(
        self, texts: list[str], onto: Memory | None, steps: int, until: float | None, progress: Progress
    ) -> BoundMemory:
        ids, author = [self.encoder.context_ids(text) for text in texts], self._author
        options: dict[str, Any] = {"onto": onto, "steps": steps, "until": until, "progress": progress}
        memory = writing.write_texts(self.method, self.task, texts, ids, author, **options)
        return BoundMemory(memory.tensors, memory.receipts, model=self)

    @property
    def _author(self) -> Author:
        return Author(self.spec["method"]["name"], self.name, options=self.method_options, **self.fingerprints)

    def most_steps(self, steps: int | None, until: float | None, max_steps: int | None) -> int:
        """Write steps that `write` takes with these arguments; with `until`, the most of them.

        Raises
        ------
        GradmemError
            If `steps` and `until` are both given, or `until` is not a positive loss.
        """
        return writing.most_steps(self.method, steps, until, max_steps)

    def token_losses(self, memory: Memory, text: str) -> list[float]:
        """Loss of each token of a context text when it is read back from a memory of one row, nats.

        Raises
        ------
        GradmemError
            If the text could not be written by this model.
        """
        return writing.token_losses(self.method, memory, self.encoder.context_ids(text))

    def open(self, path: str | os.PathLike[str]) -> BoundMemory:
        """Load a memory file that this model wrote.

        Raises
        ------
        GradmemError
            If the file is damaged, or another model wrote it.
        """
        return self.bind(Memory.load(path), str(path))

    def bind(self, memory: Memory, what: str = "the memory") -> BoundMemory:
        """Bind a memory to this model, and move it to the model's device.

        Parameters
        ----------
        memory : Memory
        what : str
            What messages call the memory.

        Returns
        -------
        BoundMemory
            If another method on the same backbone wrote it (see `takes_methods`), its model has that method.

        Raises
        ------
        GradmemError
            If another model wrote it.
        """
        if not memory.receipts:
            raise GradmemError(f"{what} does not say which model wrote it")
        if (other := self._sibling(memory)) is not None:
            return other.bind(memory, what)
        mine = self.fingerprints["checkpoint"]
        for receipt in memory.history:
            if receipt.checkpoint != mine:
                raise GradmemError(
                    f"{what} was written by the checkpoint {receipt.checkpoint[:16]} ('{receipt.model}'), "
                    f"not by {mine[:16]} ('{self.name}'): a memory answers only through the model that wrote it"
                )
        self.method.check(memory, what)
        # Counts stay on the CPU, as shapes depend on them.
        found = memory.tensors.items()
        tensors = {name: tensor.to(self.device) if tensor.is_floating_point() else tensor for name, tensor in found}
        return BoundMemory(tensors, memory.receipts, model=self)

    def _sibling(self, memory: Memory) -> MemoryModel | None:
        """This backbone under the method that wrote a memory; None if that is this model's own, or it takes none."""
        receipt, mine = memory.receipts[0], self.fingerprints
        if receipt.checkpoint == mine["checkpoint"] or receipt.backbone != mine["backbone"] or not self.takes_methods:
            return None
        if receipt.checkpoint not in self._siblings:
            # The options come from a file: none may ask for more than the file holds.
            check_counts(receipt.options, max(size for tensor in memory.tensors.values() for size in tensor.shape))
            found = self.with_method({"name": receipt.method, **receipt.options})
            if found.fingerprints["checkpoint"] != receipt.checkpoint:
                return None
            self._siblings[receipt.checkpoint] = found
        return self._siblings[receipt.checkpoint]

    @cached_property
    def _siblings(self) -> dict[str, MemoryModel]:
        """By fingerprint: other methods on this backbone that wrote memories."""
        return {}

    def answer_ids(
        self, memory: Memory, prefix: Prefix, rows: list[int], queries: list[list[int]], **options: Any
    ) -> list[Answer]:
        """Answer tokenized queries from the prefix of a memory, with evidence; see `BoundMemory.answer`.

        Parameters
        ----------
        memory : Memory
            Written by this model.
        prefix : Prefix
            What `Method.prefix` returns for the memory.
        rows : list of int
            The row of the memory that each query asks.
        queries : list of list of int
            From `TextEncoder.query_ids`.
        options
            As for `BoundMemory.answer`.
        """
        answers, states = reading.answer(self.method, self.task, memory, prefix, rows, queries, options)
        if (abstain := self.abstain) is None:
            return answers
        # A memory of bare tokens has no receipts: whoever wrote it knows how long its contexts are.
        known = [not memory.receipts or abstain.holds(memory.receipts[row]) for row in rows]
        judged = abstain.judge(answers, states)
        return [sure if good else answer for sure, answer, good in zip(judged, answers, known, strict=True)]


@dataclass
class BoundMemory(Memory):
    """A memory with the model that wrote it, which answers from it; `MemoryModel.write` and `open` return one.

    Attributes
    ----------
    tensors, receipts
        As of `Memory`.
    model : MemoryModel
    """

    model: MemoryModel = field(kw_only=True, repr=False, compare=False)

    @cached_property
    def prefix(self) -> Prefix:
        """What READ puts before a query, run once for all queries."""
        with torch.no_grad():
            return self.model.method.prefix(self)

    def ask(self, query: Any, **options: Any) -> Any:
        """Answer queries from the memory alone.

        Parameters
        ----------
        query : str, list of str, or list of lists of str
            One query; several for a memory of one row; or for each row a list of its own.
        options
            Arguments of Hugging Face's `generate`, such as `max_new_tokens` or `do_sample`: those that
            `gradmem.generation.OPTIONS` lists. The model's own generation config is ignored.

        Returns
        -------
        str, list of str, or list of lists of str
            Answers in the shape of the queries; each is a list if `num_return_sequences` asks for several.

        Raises
        ------
        GradmemError
            If a query is empty, too long or has no answer format, rows and queries do not fit together, or an option
            is not supported.
        """
        method, task = self.model.method, self.model.task

        def texts(rows: list[int], queries: list[str]) -> list[Any]:
            ids = self._query_ids(queries, options)
            found = [task.decode(row) for row in reading.generate(method, task, self.prefix, rows, ids, options)]
            each = len(found) // len(queries)
            return found if each == 1 else [found[i : i + each] for i in range(0, len(found), each)]

        return reading.in_shape(self, query, texts)

    def answer(self, query: Any, **options: Any) -> Any:
        """Answer queries from the memory alone, with the evidence for each answer.

        Parameters
        ----------
        query, options
            As for `ask`, but without options that give several answers to a query.

        Returns
        -------
        Answer, list of Answer, or list of lists of Answer
            In the shape of the queries; the texts are those of `ask`.

        Raises
        ------
        GradmemError
            As for `ask`.
        """

        def answers(rows: list[int], queries: list[str]) -> list[Answer]:
            return self.model.answer_ids(self, self.prefix, rows, self._query_ids(queries, options), **options)

        return reading.in_shape(self, query, answers)

    def restore(self) -> list[str]:
        """Texts that the memory gives back, from the memory alone, in the order of `history`.

        Raises
        ------
        GradmemError
            As for `reconstruct`.
        """
        return [self.model.task.text(ids) for ids in self.reconstruct()]

    def reconstruct(self, progress: Progress = silent) -> list[list[int]]:
        """Token ids that the memory gives back, as many as were written, in the order of `history`.

        Parameters
        ----------
        progress : callable
            See `gradmem.progress.Progress`.

        Raises
        ------
        GradmemError
            If several chunks were written into the same vectors, or the memory is damaged.
        """
        return reading.read_back(self.model.method, self, progress)

    def _query_ids(self, queries: list[str], options: dict[str, Any]) -> list[list[int]]:
        """Token ids; the memory may leave less room for a query than usual, as more or other chunks were written."""
        return [self.model.encoder.query_ids(text, options, self.prefix.length) for text in queries]
