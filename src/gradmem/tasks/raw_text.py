"""Text as it is, for language models that were not trained on any task of this package."""

from __future__ import annotations

from ..batch import Batch
from ..errors import GradmemError, require
from ..pretrained import plain_tokenizer
from .base import Split, Task


class RawText(Task):
    """Contexts and queries stay as they are, and the model continues the query. There are no samples to train on.

    Parameters
    ----------
    tokenizer : str
        Hub name or directory of a pretrained tokenizer.
    chunk_size : int
        Tokens of the parts into which a long text is cut, each for a memory of its own.
    """

    def __init__(self, tokenizer: str, chunk_size: int = 64) -> None:
        require("chunk_size", chunk_size, chunk_size >= 1, "at least 1")
        self.tokenizer = plain_tokenizer(tokenizer)
        self.chunk_size = self.answer_length = chunk_size

    @property
    def pad_id(self) -> int:
        """Id of the padding token or, if there is none, of the end token; without training they cannot be confused."""
        return self.end_id if self.tokenizer.pad_token_id is None else super().pad_id

    def batch(self, split: Split, start: int, size: int, seed: int = 0) -> Batch:
        """Refuse: there are no samples."""
        raise GradmemError("the task raw_text has no samples to train or evaluate on: use another task, such as `text`")
