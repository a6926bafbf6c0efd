"""Models that write memories, and the memories that are bound to them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ..errors import GradmemError
from ..memory import Memory
from ..prefix import Prefix
from ..progress import Progress, silent
from . import checkpoint, composing, reading, writing
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
        """Whether memories keep what is in them when more is appended: by chunks that stay apart, or by training."""
        trained, mode = self.spec["method"], self.method.chunk_mode
        cut = trained.get("chunk_size") is not None and trained.get("chunk_mode", "sequential") == mode
        return self.method.reads_together or (cut and mode not in ("joint", "parallel"))

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
            Your own questions, for a method that fits memories to questions (`compact`, `vectors`). Every fourth only
            measures.
        progress : callable
            See `gradmem.progress.Progress`.

        Returns
        -------
        BoundMemory
            One row for each text, each with a `Receipt`.

        Raises
        ------
        GradmemError
            If a text is empty, too long or has unknown characters, the number of steps is negative, or the method
            takes no questions.
        """
        most, texts = self.most_steps(steps, until, max_steps), writing.as_texts(text)
        with writing.asking(self.method, questions):
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

        A method that reads chunks together (`compact`) writes the text as further rows, with the options of the memory;
        what is there stays as it is. With `chunk_mode: independent` the text gets a memory of its own, which READ sees
        beside the others; otherwise WRITE continues from the memory as it is. Both must be learned: a checkpoint that
        was not trained on chunks in this way (see `appends`) loses nearly everything that was written before.

        Parameters
        ----------
        memory : Memory
            Written by this model; it is unchanged.
        text : str or sequence of str
            One for each row; for `compact` one chunk, or several.
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
            Its receipts are of the new texts; their `earlier` has those of the texts before. For `compact` they are of
            all chunks.

        Raises
        ------
        GradmemError
            As for `write`; if another model wrote the memory, the method takes no more text, the checkpoint was never
            trained to append, or `before` is not what was written.
        """
        memory = self.bind(memory)
        if memory.model.method.reads_together:
            if before is not None:
                raise GradmemError("each chunk of this memory stays as it is, so leave out the text written `before`")
            steps = memory.receipts[0].steps if steps is None and until is None else steps
            new = memory.model.write(text, steps, until=until, max_steps=max_steps, progress=progress)
            return memory.model.join([memory, new])
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
        ids, author = [self.encoder.context_ids(text) for text in texts], self.author
        options: dict[str, Any] = {"onto": onto, "steps": steps, "until": until, "progress": progress}
        memory = writing.write_texts(self.method, self.task, texts, ids, author, **options)
        return BoundMemory(memory.tensors, memory.receipts, model=self)

    def join(self, memories: Sequence[Memory]) -> BoundMemory:
        """Put the chunks of several memories into one, which a question reads as one document.

        Raises
        ------
        GradmemError
            If other models wrote them, with different options, or by a method that does not read chunks together.
        """
        bound = [self.bind(memory) for memory in memories]
        joined = composing.joined(bound, [memory.model for memory in bound])
        return bound[0].model.bind(joined)

    def replace(self, memory: Memory, row: int, text: str, *, progress: Progress = silent) -> BoundMemory:
        """Write one chunk of a document anew, as the others were written; these stay as they are.

        Raises
        ------
        GradmemError
            As for `join` and `write`.
        """
        memory = self.bind(memory)
        composing.check_together(memory.model)
        new = memory.model.write(text, memory.receipts[row].steps, progress=progress)
        return memory.model.bind(composing.replaced(memory, row, new))

    def forget(self, memory: Memory, row: int) -> BoundMemory:
        """Drop one chunk of a document; the others stay as they are.

        Raises
        ------
        GradmemError
            As for `join`, or if the memory has no other chunk.
        """
        memory = self.bind(memory)
        composing.check_together(memory.model)
        return memory.model.bind(composing.without(memory, row))

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
            One query, or several. A memory of several rows takes a list of queries for each row; if its method
            `reads_together`, the rows are chunks of one document, and one query or a list of them asks the document.
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

        def texts(memory: BoundMemory, rows: list[int], ids: list[list[int]]) -> list[Any]:
            found = [task.decode(row) for row in reading.generate(method, task, memory.prefix, rows, ids, options)]
            each = len(found) // len(ids)
            return found if each == 1 else [found[i : i + each] for i in range(0, len(found), each)]

        return self._read(query, options, texts)

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

        def answers(memory: BoundMemory, rows: list[int], ids: list[list[int]]) -> list[Answer]:
            return self.model.answer_ids(memory, memory.prefix, rows, ids, **options)

        return self._read(query, options, answers)

    def chosen(self, ids: list[int]) -> tuple[int, ...]:
        """Rows that a tokenized query reads together: those that `Method.choose` chooses, if there are several."""
        if len(self) == 1:
            return (0,)
        with torch.no_grad():
            return tuple(self.model.method.choose(self, ids))

    def together(self, rows: Sequence[int]) -> BoundMemory:
        """Put some rows, chunks of one document, into one row, which a query reads as one text."""
        if len(rows) == len(self) == 1:
            return self
        chosen = self.select(rows)
        if len(chosen) == 1:
            return chosen
        return BoundMemory(self.model.method.together(chosen).tensors, model=self.model)

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

    def _read(
        self,
        query: Any,
        options: dict[str, Any],
        read: Callable[[BoundMemory, list[int], list[list[int]]], list[Any]],
    ) -> Any:
        """Read queries, in the shape in which they are given: `read` takes a memory, its rows, and their queries."""
        queries = [query] if isinstance(query, str) else query
        if len(self) > 1 and self.model.method.reads_together and all(isinstance(one, str) for one in queries):
            chosen = [self.chosen(self.model.encoder.query_ids(one, options)) for one in queries]
            found: list[Any] = [None] * len(queries)
            for rows in dict.fromkeys(chosen):
                asked = [at for at, own in enumerate(chosen) if own == rows]
                part = self.together(rows)
                answers = read(part, [0] * len(asked), part._query_ids([queries[at] for at in asked], options))
                for at, answer in zip(asked, answers, strict=True):
                    found[at] = answer
            return found[0] if isinstance(query, str) else found

        def flat(rows: list[int], queries: list[str]) -> list[Any]:
            return read(self, rows, self._query_ids(queries, options))

        return reading.in_shape(self, query, flat)

    def _query_ids(self, queries: list[str], options: dict[str, Any]) -> list[list[int]]:
        """Token ids; the memory may leave less room for a query than usual, as more or other chunks were written."""
        return [self.model.encoder.query_ids(text, options, self.prefix.end) for text in queries]
