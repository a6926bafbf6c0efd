"""Text compression: the memory of a chunk of text reproduces the chunk."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ..batch import Batch
from ..data import Query, Sample, Samples, cached, digest_files
from ..data.sources import held_out, hub_rows, is_hub, read_lines
from ..errors import GradmemError
from ..pretrained import digest_tokenizer, pretrained_tokenizer
from .base import FileTask, Split

HELD_OUT = 20
"""One in so many training chunks is held out for validation."""


class Text(FileTask):
    """Chunks of text files. The only query is a begin token, its target is the whole chunk.

    Metrics: the share of exact chunks (`exact_match`); the share of tokens that are predicted from the true ones before
    them (`token_accuracy`) or generated (`generated_accuracy`); and the code length of a chunk given its memory
    (`bits`).

    Parameters
    ----------
    tokenizer : str, optional
        Hub name or directory of a pretrained tokenizer. By default every byte is a token.
    data : str, optional
        Directory with a folder `train` of text files, and a folder `test` or `valid` for the test split; or a data set
        of the hub with a column `text`. One in twenty training chunks is for validation. Required to train and to
        evaluate.
    chunk_size : int
        Tokens of a chunk. A shorter rest at the end of a file is left out; a note says how many tokens.
    """

    generates = True
    chunk_size: int

    def __init__(self, tokenizer: str | None = None, data: str | None = None, chunk_size: int = 128) -> None:
        super().__init__()
        if chunk_size < 1:
            raise GradmemError(f"chunk_size must be at least 1, not {chunk_size}")
        self.data, self.chunk_size, self.answer_length = data, chunk_size, chunk_size
        self.tokenizer = pretrained_tokenizer(tokenizer) if tokenizer else byte_tokenizer()
        self.begin = str(self.tokenizer.bos_token or self.tokenizer.eos_token)

    @property
    def label(self) -> str:
        """Length of a chunk."""
        return f"chunks of {self.chunk_size} tokens"

    def source(self, split: Split) -> str:
        """The name of the data."""
        return str(self.data)

    @property
    def whole_query(self) -> list[int]:
        """The begin token."""
        return [self._begin_id]

    def encode_query(self, text: str) -> list[int]:
        """Return the begin token, whatever the query is, and warn if it is a question."""
        if text not in ("", self.begin):
            warnings.warn(
                "this model recites a text and does not answer questions: whatever it is asked, it begins at the "
                "beginning; `gradmem restore` reads the text back",
                stacklevel=2,
            )
        return self.whole_query

    def target(self, query: str, answer: str) -> tuple[list[int], list[int]]:
        """The begin token, and the text after it, without an end token."""
        return self.whole_query, self.encode(answer)

    def statement(self, query: str, answer: str) -> str:
        """The answer alone: no text has a query in it."""
        return answer

    def load(self, split: Split) -> Samples:
        """Read a split from its files, or from the cache."""
        if self.data is None:
            raise GradmemError("text needs `data`: a directory with folders train and test, or a data set of the hub")
        about: dict[str, Any] = {"task": "text", "split": split, "chunk_size": self.chunk_size, "held_out": HELD_OUT}
        about |= {"tokenizer": digest_tokenizer(self.tokenizer)}
        if is_hub(self.data):
            name = "test" if split == "test" else "train"
            texts = (row["text"] for row in hub_rows(self.data, name))
            return cached(about | {"hub": self.data}, lambda: self._make(texts, split))
        files = self._files(Path(self.data), split)
        texts = ("\n".join(line for _, line in read_lines(file)) for file in files)
        return cached(about | {"files": digest_files(files)}, lambda: self._make(texts, split))

    def judge(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Correct tokens and code length of each chunk.

        If all tokens are correct here, greedy generation gives the same chunk: exact match is the same for both.
        """
        wanted, targets = (batch.labels != -100).cpu(), batch.answers
        right = (logits.argmax(-1) == targets).cpu().double()
        bits = F.cross_entropy(logits.float(), targets, reduction="none").cpu().double() / np.log(2)
        rows = batch.targets.cpu() // wanted.shape[1]
        total = torch.zeros(len(wanted), dtype=torch.double)
        return super().judge(logits, batch) | {
            "token_accuracy": total.index_add(0, rows, right) / wanted.sum(1),
            "bits": total.index_add(0, rows, bits),
        }

    def judge_generated(self, generated: list[list[int]], batch: Batch) -> dict[str, Tensor]:
        """Share of tokens that are generated at their position in the chunk."""
        accuracy = []
        for ids, labels in zip(generated, batch.labels.tolist(), strict=True):
            target = [label for label in labels if label != -100]
            accuracy.append(sum(a == b for a, b in zip(ids, target, strict=False)) / len(target))
        return {"generated_accuracy": torch.tensor(accuracy, dtype=torch.double)}

    @property
    def _begin_id(self) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(self.begin))

    def _files(self, directory: Path, split: Split) -> list[Path]:
        names = ["test", "valid"] if split == "test" else ["train"]
        for folder in (directory / name for name in names):
            files = sorted(folder.glob("*.txt"))
            if files:
                return files
        raise GradmemError(f"{directory} has no text files (*.txt) in a folder {' or '.join(names)}")

    def _make(self, texts: Iterable[str], split: Split) -> Samples:
        chunks: list[np.ndarray] = []
        left = 0
        for text in texts:
            ids = np.array(self.encode(text), dtype=np.int32)
            whole = len(ids) // self.chunk_size
            chunks += list(ids[: whole * self.chunk_size].reshape(whole, self.chunk_size))
            left += len(ids) - whole * self.chunk_size
        train = len(chunks) - held_out(len(chunks), HELD_OUT)
        mine = chunks[{"train": slice(train), "valid": slice(train, None), "test": slice(None)}[split]]
        files = "test" if split == "test" else "training"
        notes = [f"{left} tokens at the ends of the {files} texts, too few for a chunk, are left out"] if left else []
        return Samples.build(self._samples(mine), notes)

    def _samples(self, chunks: list[np.ndarray]) -> Iterator[Sample]:
        for chunk in chunks:
            yield Sample(chunk, [Query([self._begin_id, *chunk], 1)])


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token for each byte of a text in UTF-8."""
    special = ["[PAD]", "[BEGIN]", "[END]"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    named = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **named)
