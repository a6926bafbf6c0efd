"""What the programs on the board share: texts with questions, and how answers become rows."""

from __future__ import annotations

import argparse
import json
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradmem.evaluation.board_rows import ALONG, TIMED, Key, Outcome, rows_of

Ids = list[list[int]]


class Reader(ABC):
    """What answers questions about one text."""

    nbytes: int
    """Bytes of keys and values that are kept."""

    @abstractmethod
    def answers(self, queries: Ids, ends: Sequence[int], most: int, least: int = 0) -> Ids:
        """Greedy answers of at least and at most so many tokens, each up to its end token."""

    @abstractmethod
    def logprobs(self, queries: Ids, answers: Ids) -> Tensor:
        """Log-probabilities at all tokens of given answers: shape (tokens, vocabulary)."""


def parser(description: str | None) -> argparse.ArgumentParser:
    """Make the command line that the programs share."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("model", help="language model")
    made.add_argument("answers", type=Path, help="what `gradmem board --answers` has saved")
    made.add_argument("--budgets", type=float, nargs="+", default=[0.2, 0.1, 0.05], help="fractions of the cache")
    made.add_argument("--contexts", type=int, help="only so many texts; default: all")
    made.add_argument("--threads", type=int, default=1, help="threads of PyTorch")
    made.add_argument("--json", type=Path, required=True, help="where to save the rows")
    return made


class Measurement:
    """Outcomes of the readers of all texts.

    Parameters
    ----------
    options : Namespace
        From `parser`.
    tokenizer : PreTrainedTokenizer
    """

    def __init__(self, options: argparse.Namespace, tokenizer: Any) -> None:
        torch.set_num_threads(options.threads)
        self.said = json.loads(options.answers.read_text(encoding="utf-8"))
        self.texts = self.said["texts"][: options.contexts]
        self.ends = self.said["end_ids"]
        self.options, self.tokenizer, self.done = options, tokenizer, 0
        self.outcomes: dict[Key, list[Outcome]] = defaultdict(list)
        self.full: list[str] = []
        self.teacher = torch.zeros(0)

    def add(self, writer: str, budget: float, reader: Reader, seconds: float, text: dict[str, Any]) -> None:
        """Ask a reader all questions on a text; `full` comes first."""
        asked = text["questions"]
        queries, along = [one["query"] for one in asked], [one["along"] for one in asked]
        ids = reader.answers(queries, self.ends, self.said["answer_length"])
        answers = [self.tokenizer.decode(own, skip_special_tokens=True).strip() for own in ids]
        logprobs, took = reader.logprobs(queries, along), None
        if writer == "full":
            self.full, self.teacher = answers, logprobs
            self.done += 1
            print(f"text {self.done} of {len(self.texts)}", flush=True)
        if self.done <= TIMED:
            started = time.perf_counter()
            reader.answers(queries[:1], self.ends, ALONG, ALONG)
            took = time.perf_counter() - started
        teacher = self.teacher
        outcome = Outcome.of(
            answers,
            [one["references"] for one in asked],
            self.full,
            kl=float((teacher.exp() * (teacher - logprobs)).sum(-1).mean()),
            agreement=float((teacher.argmax(-1) == logprobs.argmax(-1)).double().mean()),
            bytes=reader.nbytes,
            write_seconds=seconds,
            query_seconds=took,
        )
        self.outcomes[writer, budget].append(outcome)

    def save(self) -> None:
        """Save the rows, without those of `full` and `none`, which the board has itself."""
        about = {name: self.said[name] for name in ("model", "data", "max_words", "seed")}
        rows = rows_of(self.outcomes, about)
        for row in rows:
            shown = ", ".join(f"{name} {row[name]:.3f}" for name in ("gap_closed", "kl", "exact_match", "f1_full"))
            print(f"{row['writer']} {row['budget']:g}: {row['bytes']:,} bytes, {shown}, {row['write_seconds']:.2f} s")
        kept = [row for row in rows if row["writer"] not in ("full", "none")]
        self.options.json.write_text(json.dumps(kept, indent=1), encoding="utf-8")
