"""What a task is: contexts with queries and targets, and the words to say them in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ..batch import Batch
from ..choices import Split
from ..data import Samples, collate, split_indices
from ..data.decoding import only_grows, without_last_bytes
from ..errors import refused

OTHER_TEXTS = (
    "for any other text, as a letter or a table, write with a plain language model (gradmem write MODEL FILE), which "
    "recites it and does not answer questions about it"
)
"""What to do with a text that a checkpoint was not trained on, for the end of an error message."""
WRITTEN = "written here"
"""The kind of queries whose answers stand in the contexts they ask."""


class Task(ABC):
    """Base of all tasks.

    A task is one file in `gradmem/tasks/` with one subclass of this. `batch` serves training and evaluation, `judge`
    and `judge_generated` score answers; the text methods serve people, and have defaults that pass text through.
    """

    tokenizer: PreTrainedTokenizerFast
    answer_length: int
    """Most tokens that an answer takes."""
    chunk: int | None = None
    """Tokens that a long text is cut after, each part for a memory of its own; None where texts stay whole."""
    reads: bool = True
    """Whether evaluation reads the targets token by token, the true ones before them, for `judge`."""
    generates: bool = False
    """Whether evaluation generates answers, for `judge_generated`."""

    @property
    def label(self) -> str:
        """What tables call this task."""
        return type(self).__name__.lower()

    def variants(self) -> list[dict[str, Any]]:
        """Options under which evaluation measures this task, one after the other."""
        return [{}]

    @property
    def pad_id(self) -> int:
        """Id of the pad token."""
        return int(self.tokenizer.pad_token_id)

    @property
    def end_id(self) -> int:
        """Id of the token that ends an answer."""
        return int(self.tokenizer.eos_token_id)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, in which the names of special tokens mean nothing special."""
        options = {"add_special_tokens": False, "split_special_tokens": True}
        with refused("the tokenizer cannot read this text"):
            ids: list[int] = self.tokenizer(text, **options, verbose=False).input_ids  # limits are the memory's to know
        return ids

    def encode_pair(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """Tokens of a prompt, and of its target (the end token included) as they stand after it in one text.

        Some tokenizers begin every text as if after a space.
        """
        ids, both = self.encode(prompt), self.encode(prompt + answer)
        split = both[: len(ids)] == ids
        return ids, [*(both[len(ids) :] if split else self.encode(answer)), self.end_id]

    def encode_query(self, text: str) -> list[int]:
        """Token ids of a query as people write it."""
        return self.encode(self.query_text(text))

    def target(self, query: str, answer: str) -> tuple[list[int], list[int]]:
        """Tokens of a query as people write it, and of its target, an answer as `examples` says it."""
        return self.encode_pair(self.query_text(query), answer)

    def pieces(self, text: str) -> list[str]:
        """The part of a text that each of its tokens stands for, up to where the next one begins."""
        options = {"add_special_tokens": False, "split_special_tokens": True, "return_offsets_mapping": True}
        with refused("the tokenizer cannot read this text"):
            encoded = self.tokenizer(text, **options)
        starts = [start for start, _ in encoded.offset_mapping]
        return [text[start:stop] for start, stop in zip(starts, [*starts[1:], len(text)], strict=True)]

    def text(self, ids: list[int]) -> str:
        """The text that token ids stand for, to the letter where the tokenizer keeps everything."""
        text: str = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text

    def decode(self, ids: list[int]) -> str:
        """The answer in generated tokens: what stands before the end token."""
        ids = ids[: ids.index(self.end_id)] if self.end_id in ids else ids
        return self.answer_text(self.tokenizer.decode([i for i in ids if i != self.pad_id]))

    def settled(self, ids: list[int]) -> str:
        """The beginning of `decode(ids)` that no further token changes: what can be shown of an answer as it comes.

        A task whose own `answer_text` only ever grows with its tokens returns `_settled(ids)`. Here, where a task
        rewrites, nothing is settled before the end token.
        """
        own = type(self)
        rewrites = own.answer_text is not Task.answer_text or own.decode is not Task.decode
        return "" if rewrites and self.end_id not in ids else self._settled(ids)

    def _settled(self, ids: list[int]) -> str:
        """What is settled as far as the tokenizer is concerned."""
        if self.end_id in ids:
            return self.decode(ids)
        if not self._only_grows:
            return ""
        ids = without_last_bytes(self.tokenizer, [one for one in ids if one != self.pad_id])
        return self.decode(ids).rstrip("\ufffd")  # as which half a character is decoded

    @cached_property
    def _only_grows(self) -> bool:
        return only_grows(self.tokenizer)

    def size(self, split: Split) -> int | None:
        """Samples in a split; None where they are generated without end."""
        return None

    def source(self, split: Split) -> str:
        """Where the samples of a split come from."""
        return "generated"

    def notes(self, split: Split) -> list[str]:
        """What people should know of a split, as how many contexts were cut; reading it may take a while."""
        return []

    @abstractmethod
    def batch(self, split: Split, start: int, size: int, seed: int = 0) -> Batch:
        """Samples `start` to `start + size` of a split.

        A pure function of its arguments, so that a resumed run and a second process see the samples they should.
        """

    def scored(self, labels: Tensor) -> Tensor:
        """Which label positions exact match looks at, bool, the shape of `labels`."""
        return labels != -100

    def judge(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Score answers that were read token by token.

        Parameters
        ----------
        logits : Tensor, shape (targets, vocabulary)
            At the positions where labels are not -100, in order.

        Returns
        -------
        dict of Tensor, shape (queries,)
            By name, among them `exact_match` where nothing is generated.
        """
        return {"exact_match": exact_match(logits.argmax(-1), batch, self.scored(batch.labels))}

    def judge_generated(self, generated: list[list[int]], batch: Batch) -> dict[str, Tensor]:
        """Score generated answers, the new tokens of each query; the result is as that of `judge`."""
        raise NotImplementedError

    def calibration(self, split: Split, start: int, size: int, seed: int = 0) -> dict[str, Batch]:
        """Contexts with queries by kind, to learn when to abstain: those of `WRITTEN`, which they answer, and others.

        Here a batch and what is `unanswerable` of it. A task overrides this where people write other contexts, as
        shorter ones, or ask other queries.

        Returns
        -------
        dict of Batch
            All of the same contexts.
        """
        batch = self.batch(split, start, size, seed)
        return {WRITTEN: batch, **self.unanswerable(batch)}

    def may_end(self, ids: Tensor) -> Tensor:
        """After which tokens of contexts a chunk may end, where contexts are cut, so that what belongs together is not.

        Parameters
        ----------
        ids : Tensor, int64, shape (batch, length)

        Returns
        -------
        Tensor, bool, shape (batch, length)
            Here True everywhere.
        """
        return torch.ones_like(ids, dtype=torch.bool)

    def unanswerable(self, batch: Batch) -> dict[str, Batch]:
        """Queries whose answers stand in none of the contexts they ask, by kind; abstaining is fitted on them.

        Here those of the next context. A task overrides this where another context may hold the same answer, or where
        it knows harder ones.
        """
        swapped = (batch.rows + 1) % len(batch.context)
        return {"of another context": Batch(batch.context, batch.queries, batch.labels, swapped, batch.references)}

    def statement(self, query: str, answer: str) -> str:
        """The text by which a context says the answer to a query, which is given as the model reads it."""
        return query + answer

    def context_text(self, text: str) -> str:
        """Bring a user's text into the form that the model was trained on."""
        return text

    def query_text(self, text: str) -> str:
        """Bring a user's query into the form that the model was trained on."""
        return text

    def answer_text(self, text: str) -> str:
        """Cut the answer out of generated text."""
        return text

    def examples(self, text: str) -> list[tuple[str, str]]:
        """Return the queries that a context text answers, and their answers; see `Receipt.answers`."""
        return []

    def example(self, seed: int = 0) -> tuple[str, list[tuple[str, str]]] | None:
        """A text as a user writes it, with queries and their true answers; None where it would take data to make one.

        Parameters
        ----------
        seed : int
            Another one for another number, none of them seen in training.
        """
        return None


class FileTask(Task):
    """Base of tasks whose samples come from files: `load` makes those of a split."""

    def __init__(self) -> None:
        self._loaded: dict[Split, Samples] = {}

    @abstractmethod
    def load(self, split: Split) -> Samples:
        """Read the samples of a split, or take them from the cache."""

    def samples(self, split: Split) -> Samples:
        """The samples of a split, which are read when they are first asked for: a checkpoint needs no data."""
        if split not in self._loaded:
            self._loaded[split] = self.load(split)
        return self._loaded[split]

    def size(self, split: Split) -> int | None:
        """Contexts in a split."""
        return len(self.samples(split))

    def notes(self, split: Split) -> list[str]:
        """What was cut or left out."""
        return self.samples(split).notes

    def batch(self, split: Split, start: int, size: int, seed: int = 0) -> Batch:
        """Samples of a split, in training round and round in ever new orders; see `Task.batch`.

        In the other splits neighbours, which evaluation swaps, come from different parts of the files, and so do the
        first few samples, if no more are asked for.

        Raises
        ------
        GradmemError
            When there are not as many, and training is not meant.
        """
        samples = self.samples(split)
        chosen = split_indices(split, start, size, len(samples), seed, shuffled=True)
        return collate([samples[int(i)] for i in chosen], self.pad_id)


def exact_match(predicted: Tensor, batch: Batch, scored: Tensor) -> Tensor:
    """Whether every scored target token of a query is predicted.

    Parameters
    ----------
    predicted : Tensor, int64, shape (targets,)
        Predictions of the target tokens, in order.
    batch : Batch
    scored : Tensor, bool, shape (queries, length)

    Returns
    -------
    Tensor, bool, shape (queries,)
    """
    right = torch.ones_like(scored).flatten().index_copy(0, batch.targets, predicted == batch.answers)
    return (right.view_as(scored) | ~scored).all(1)
