"""The base of all tasks: contexts with queries and targets, and how users write them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
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
    "for any other text, such as a letter or a report, write with a language model (gradmem write smollm2 FILE), "
    "which answers questions about it"
)
"""End of an error message: what to do with a text that a checkpoint was not trained on."""
Conversation = Sequence[dict[str, str]]
"""Messages with `role` and `content`, the oldest first."""
WRITTEN = "written here"
"""The kind of queries that their context answers."""


class Task(ABC):
    """Base of all tasks.

    A task is one file in `gradmem/tasks/` with one subclass. `batch` makes samples for training and evaluation; `judge`
    and `judge_generated` score answers; the methods for text turn what users write into what the model was trained on,
    and by default leave it as it is.
    """

    tokenizer: PreTrainedTokenizerFast
    answer_length: int
    """Most tokens that an answer takes."""
    chunk_size: int | None = None
    """Tokens of the parts into which a long text is cut, each for a memory of its own; None if texts stay whole."""
    reads: bool = True
    """Whether evaluation predicts each target token from the true ones before it, for `judge`."""
    generates: bool = False
    """Whether evaluation generates answers, for `judge_generated`."""

    prompt_template: str | None = None
    """The template that stands around text and question, if the tokenizer brings one: part of the fingerprint."""

    @property
    def label(self) -> str:
        """Name of the task in tables."""
        return type(self).__name__.lower()

    def variants(self) -> list[dict[str, Any]]:
        """Options with which evaluation runs this task, one after the other."""
        return [{}]

    @property
    def pad_id(self) -> int:
        """Id of the padding token."""
        return int(self.tokenizer.pad_token_id)

    @property
    def whole_query(self) -> list[int]:
        """Token ids of the query that is answered with the whole text.

        Empty if there is none: a text is then read back as WRITE reads it.
        """
        return []

    @property
    def end_id(self) -> int:
        """Id of the token that ends an answer."""
        return int(self.tokenizer.eos_token_id)

    @property
    def end_ids(self) -> list[int]:
        """Ids of all tokens at which generation of an answer ends, `end_id` among them."""
        return [self.end_id]

    @property
    def before_context(self) -> list[int]:
        """Token ids that stand before every context and are no part of it: methods that read it with the model read
        these first. None by default."""
        return []

    def greedy_options(self) -> dict[str, Any]:
        """Options of generation for an answer of always the likeliest next token, up to an end token."""
        return {"max_new_tokens": self.answer_length, "do_sample": False, "eos_token_id": self.end_ids}

    @cached_property
    def longest_token(self) -> int:
        """Characters of the tokenizer's longest token."""
        return max(map(len, self.tokenizer.get_vocab()))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. The names of special tokens are encoded as text."""
        options = {"add_special_tokens": False, "split_special_tokens": True}
        with refused("the tokenizer cannot read this text"):
            ids: list[int] = self.tokenizer(text, **options, verbose=False).input_ids  # the model checks lengths
        return ids

    def encode_pair(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """Tokens of a prompt, and of its target with the end token, as if both were one text.

        The target is not encoded by itself, because some tokenizers begin every text with a space.
        """
        ids, both = self.encode(prompt), self.encode(prompt + answer)
        split = both[: len(ids)] == ids
        return ids, [*(both[len(ids) :] if split else self.encode(answer)), self.end_id]

    def encode_query(self, text: str) -> list[int]:
        """Token ids of a query as users write it."""
        return self.encode(self.query_text(text))

    def encode_conversation(self, messages: Conversation) -> list[int]:
        """Token ids of a conversation about a context, up to where the next answer begins.

        By default this is the last message of the user, encoded as a query.
        """
        return self.encode_query(self.conversation_text(messages))

    def conversation_text(self, messages: Conversation) -> str:
        """What `encode_conversation` encodes, as text: by default the last message of the user."""
        return next((one["content"] for one in reversed(messages) if one["role"] == "user"), "")

    def target(self, query: str, answer: str) -> tuple[list[int], list[int]]:
        """Tokens of a query as users write it, and of its target, an answer as in `examples`."""
        return self.encode_pair(self.query_text(query), answer)

    def pieces(self, text: str) -> list[str]:
        """Split a text into the parts of its tokens, each up to where the next one begins."""
        options = {"add_special_tokens": False, "split_special_tokens": True, "return_offsets_mapping": True}
        with refused("the tokenizer cannot read this text"):
            encoded = self.tokenizer(text, **options)
        starts = [start for start, _ in encoded.offset_mapping]
        return [text[start:stop] for start, stop in zip(starts, [*starts[1:], len(text)], strict=True)]

    def text(self, ids: list[int]) -> str:
        """Text of token ids; exact, if the tokenizer keeps all characters."""
        text: str = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text

    def decode(self, ids: list[int]) -> str:
        """The answer in generated tokens: the text before the end token."""
        ids = ids[: ids.index(self.end_id)] if self.end_id in ids else ids
        return self.answer_text(self.tokenizer.decode([i for i in ids if i != self.pad_id]))

    def settled(self, ids: list[int]) -> str:
        """The beginning of `decode(ids)` that further tokens do not change: what can be shown while they are generated.

        If a task has its own `answer_text` or `decode`, this is empty until the end token. A task whose `answer_text`
        never changes the beginning of an answer overrides this to return `_settled(ids)`.
        """
        own = type(self)
        rewrites = own.answer_text is not Task.answer_text or own.decode is not Task.decode
        return "" if rewrites and self.end_id not in ids else self._settled(ids)

    def _settled(self, ids: list[int]) -> str:
        """The beginning that the tokenizer does not change."""
        if self.end_id in ids:
            return self.decode(ids)
        if not self._only_grows:
            return ""
        ids = without_last_bytes(self.tokenizer, [one for one in ids if one != self.pad_id])
        return self.decode(ids).rstrip("\ufffd")  # an incomplete character

    @cached_property
    def _only_grows(self) -> bool:
        return only_grows(self.tokenizer)

    def size(self, split: Split) -> int | None:
        """Number of samples in a split; None if they are generated without end."""
        return None

    def source(self, split: Split) -> str:
        """Where the samples of a split come from."""
        return "generated"

    def notes(self, split: Split) -> list[str]:
        """What users should know about a split, such as how many contexts were cut; may read all its files."""
        return []

    @abstractmethod
    def batch(self, split: Split, start: int, size: int, seed: int = 0) -> Batch:
        """Samples `start` to `start + size` of a split.

        The result depends on the arguments only, so that resumed runs and parallel processes get the right samples.
        """

    def scored(self, labels: Tensor) -> Tensor:
        """Which label positions count for exact match, bool, in the shape of `labels`."""
        return labels != -100

    def judge(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Score answers, each token predicted from the true ones before it.

        Parameters
        ----------
        logits : Tensor, shape (targets, vocabulary)
            Predictions of all target tokens, in order.

        Returns
        -------
        dict of Tensor, shape (queries,)
            Metrics by name; `exact_match` is one of them, unless `judge_generated` returns it.
        """
        return {"exact_match": exact_match(logits.argmax(-1), batch, self.scored(batch.labels))}

    def judge_generated(self, generated: list[list[int]], batch: Batch) -> dict[str, Tensor]:
        """Score generated answers, given the new tokens of each query; returns what `judge` returns."""
        raise NotImplementedError

    def right(self, answer: str, wanted: str, references: list[str]) -> bool:
        """Whether an answer is right, to fit when to abstain; by default, whether it is the wanted one.

        Parameters
        ----------
        answer, wanted : str
        references : list of str
            All right answers; empty if the task does not tell them.
        """
        return answer == wanted

    def calibration_size(self, split: Split) -> int | None:
        """Number of contexts that `calibration` has; None if they are generated without end."""
        return self.size(split)

    def calibration(self, split: Split, start: int, size: int, seed: int = 0) -> dict[str, Batch]:
        """Contexts with answerable queries and unanswerable ones, to fit when to abstain.

        By default these are a batch and its `unanswerable` queries. A task overrides it if users write other contexts,
        such as shorter ones, or ask other queries.

        Returns
        -------
        dict of Batch
            Queries of the same contexts by kind. Those of kind `WRITTEN` are answerable.
        """
        batch = self.batch(split, start, size, seed)
        return {WRITTEN: batch, **self.unanswerable(batch)}

    def may_end(self, ids: Tensor) -> Tensor:
        """After which tokens a chunk may end, so that a cut does not separate what belongs together.

        Parameters
        ----------
        ids : Tensor, int64, shape (batch, length)

        Returns
        -------
        Tensor, bool, shape (batch, length)
            By default True everywhere.
        """
        return torch.ones_like(ids, dtype=torch.bool)

    def chunk_end(self, text: str) -> int:
        """Where a chunk of a long text should end, if it may at most have these characters; at least 1.

        By default it is as long as possible.
        """
        return len(text)

    def unanswerable(self, batch: Batch) -> dict[str, Batch]:
        """Queries that their context does not answer, by kind, to fit when to abstain.

        By default these are the queries of the next context. A task overrides this if two contexts may have the same
        answer, or if it can make harder queries.
        """
        swapped = (batch.rows + 1) % len(batch.context)
        return {"of another context": Batch(batch.context, batch.queries, batch.labels, swapped, batch.references)}

    def statement(self, query: str, answer: str) -> str:
        """The text with which a context states an answer; `query` is in the model's form."""
        return query + answer

    def context_text(self, text: str) -> str:
        """Turn a user's text into the form that the model was trained on."""
        return text

    def query_text(self, text: str) -> str:
        """Turn a user's query into the form that the model was trained on."""
        return text

    def answer_text(self, text: str) -> str:
        """Take the answer from generated text."""
        return text

    def examples(self, text: str) -> list[tuple[str, str]]:
        """Return queries that a text answers, with their answers; see `Receipt.answers`."""
        return []

    def example(self, seed: int = 0) -> tuple[str, list[tuple[str, str]]] | None:
        """Return a text as users write it, with queries and their true answers; None if this needs data.

        Parameters
        ----------
        seed : int
            Each seed gives another text; none of them is in the training data.
        """
        return None


class FileTask(Task):
    """Base of tasks whose samples come from files; a subclass defines `load`."""

    def __init__(self) -> None:
        self._loaded: dict[Split, Samples] = {}

    @abstractmethod
    def load(self, split: Split) -> Samples:
        """Read the samples of a split from files or from the cache."""

    def samples(self, split: Split) -> Samples:
        """The samples of a split, read at first use: a checkpoint can answer without data."""
        if split not in self._loaded:
            self._loaded[split] = self.load(split)
        return self._loaded[split]

    def size(self, split: Split) -> int | None:
        """Number of contexts in a split."""
        return len(self.samples(split))

    def notes(self, split: Split) -> list[str]:
        """How many contexts or questions were cut or left out."""
        return self.samples(split).notes

    def batch(self, split: Split, start: int, size: int, seed: int = 0) -> Batch:
        """Samples of a split; see `Task.batch`. Training repeats the split, each time in a new order.

        The other splits have one random order: evaluation swaps the memories of neighbours, which should be of other
        parts of the files, and may use only the first few samples.

        Raises
        ------
        GradmemError
            If a split other than training has fewer samples.
        """
        samples = self.samples(split)
        chosen = split_indices(split, start, size, len(samples), seed, shuffled=True)
        return collate([samples[int(i)] for i in chosen], self.pad_id)


def exact_match(predicted: Tensor, batch: Batch, scored: Tensor) -> Tensor:
    """Whether all scored target tokens of a query are predicted.

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
