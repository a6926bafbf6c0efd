"""Text as it is, for language models that were trained on no task of ours."""

from __future__ import annotations

from ..batch import Batch
from ..errors import GradmemError, require
from ..pretrained import plain_tokenizer
from .base import Split, Task


class Plain(Task):
    """Contexts and queries pass through; a query is continued after the memory. There are no samples to train on.

    Parameters
    ----------
    tokenizer : str
        Hub name or directory of a pretrained tokenizer.
    chunk : int
        Tokens of each memory's share of a long text.
    """

    def __init__(self, tokenizer: str, chunk: int = 64) -> None:
        require("chunk", chunk, chunk >= 1, "at least 1")
        self.tokenizer = plain_tokenizer(tokenizer)
        self.chunk = self.answer_length = chunk

    @property
    def pad_id(self) -> int:
        """Id of the pad token, or of the end token: nothing is trained here that could mix them up."""
        return self.end_id if self.tokenizer.pad_token_id is None else super().pad_id

    def batch(self, split: Split, start: int, size: int, seed: int = 0) -> Batch:
        """Refuse: there are no samples."""
        raise GradmemError("a plain language model has no samples to train or measure on: take another task, as `text`")
