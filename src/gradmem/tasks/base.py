"""What a task is: contexts with queries and targets, and the words to say them in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ..batch import Batch

Split = Literal["train", "valid", "test"]


class Task(ABC):
    """Base of all tasks.

    A task is one file in `gradmem/tasks/` with one subclass of this. `batch` serves training and evaluation; the
    text methods serve people, and have defaults that pass text through.
    """

    tokenizer: PreTrainedTokenizerFast
    answer_length: int
    """Most tokens that an answer takes."""

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
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        return ids

    @abstractmethod
    def batch(self, split: Split, start: int, size: int, seed: int = 0) -> Batch:
        """Samples `start` to `start + size` of a split.

        A pure function of its arguments, so that a resumed run and a second process see the samples they should.
        """

    def scored(self, labels: Tensor) -> Tensor:
        """Which label positions exact match looks at, bool, the shape of `labels`."""
        return labels != -100

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
        """Queries and true answers that a context text contains, where the task can tell."""
        return []
