"""Rows of the board for presses of kvpress, in an environment of its own; see the package's docstring.

Questions begin after the end of the text, as kvpress counts positions. Presses that hide entries instead of removing
them (KVzip, AdaKV) are counted by what is left. SnapKV keeps the last tokens by whose queries it scores, 64 of them by
default. Short texts do not have so many, so here these are at most half of what is kept.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import kvpress
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

from benchmarks.board.common import Ids, Measurement, Reader, parser

WINDOW = 64
"""Most tokens by whose queries SnapKV scores: its default."""
PRESSES: dict[str, Callable[[float, int], Any]] = {
    "StreamingLLM": lambda ratio, _: kvpress.StreamingLLMPress(compression_ratio=ratio),
    "Knorm": lambda ratio, _: kvpress.KnormPress(compression_ratio=ratio),
    "KeyDiff": lambda ratio, _: kvpress.KeyDiffPress(compression_ratio=ratio),
    "SnapKV": lambda ratio, length: kvpress.SnapKVPress(
        compression_ratio=ratio, window_size=max(1, min(WINDOW, int((1 - ratio) * length) // 2))
    ),
    "ExpectedAttention": lambda ratio, _: kvpress.ExpectedAttentionPress(compression_ratio=ratio),
    "AdaKV": lambda ratio, _: kvpress.AdaKVPress(kvpress.ExpectedAttentionPress(compression_ratio=ratio)),
    "KVzip": lambda ratio, _: kvpress.KVzipPress(compression_ratio=ratio),
}
"""Presses by name, each from the part of the cache that it removes, and the tokens of the text."""


class CacheReader(Reader):
    """A model after a cache whose entries have positions of their own.

    Parameters
    ----------
    model : PreTrainedModel
    cache : DynamicCache
        Of one row.
    start : int
        Position of the first token of a question.
    """

    def __init__(self, model: Any, cache: DynamicCache, start: int) -> None:
        self.model, self.cache, self.begin = model, cache, start
        self.hidden = [getattr(layer.self_attn, "masked_key_indices", None) for layer in model.model.layers]
        every = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        left_out = sum(len(indices[0]) for indices in self.hidden if indices is not None)
        self.nbytes = every - left_out * 2 * cache.layers[0].keys.shape[-1] * cache.layers[0].keys.element_size()

    def answers(self, queries: Ids, ends: Sequence[int], most: int, least: int = 0) -> Ids:
        """Greedy answers to all queries in one batch."""
        logits, state = self._start(*padded(queries))
        found: Ids = [[] for _ in queries]
        over = [False] * len(queries)
        while not all(over):
            after = logits[:, -1]
            if len(found[0]) < least:
                after = after.index_fill(1, torch.tensor(ends), -torch.inf)
            chosen = after.argmax(-1)
            for row, token in enumerate(chosen.tolist()):
                found[row].append(token)
                over[row] = over[row] or token in ends or len(found[row]) == most
            if not all(over):
                logits, state = self._proceed(state, chosen[:, None])
        return [row[: next((at + 1 for at, one in enumerate(row) if one in ends), len(row))] for row in found]

    def logprobs(self, queries: Ids, answers: Ids) -> Tensor:
        """Log-probabilities at all tokens of given answers."""
        logits, _ = self._start(*padded([query + answer for query, answer in zip(queries, answers, strict=True)]))
        own = [row[-len(answer) - 1 : -1] for row, answer in zip(logits, answers, strict=True)]
        return torch.cat(own).float().log_softmax(-1)

    def _start(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
        """Read rows of token ids after the cache, which is copied for each row: logits, and where to go on."""
        rows, cache = len(ids), copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        cache.batch_repeat_interleave(rows)
        for layer, indices in zip(self.model.model.layers, self.hidden, strict=True):
            layer.self_attn.masked_key_indices = indices and (
                torch.arange(rows).repeat_interleave(len(indices[0])),
                *(one.repeat(rows) for one in indices[1:]),
            )
        entries = torch.ones(rows, cache.get_seq_length(), dtype=mask.dtype)
        positions = self.begin + mask.cumsum(1) - 1
        return self._run(cache, ids, torch.cat([entries, mask], 1), positions.clamp_min(0))

    def _proceed(self, state: Any, ids: Tensor) -> tuple[Tensor, Any]:
        """Read one more token of each row."""
        cache, mask, last = state
        return self._run(cache, ids, torch.cat([mask, mask.new_ones(len(mask), 1)], 1), last + 1)

    def _run(self, cache: DynamicCache, ids: Tensor, mask: Tensor, positions: Tensor) -> tuple[Tensor, Any]:
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        return self.model(**given).logits, (cache, mask, positions[:, -1:])


def padded(rows: Ids) -> tuple[Tensor, Tensor]:
    """Rows of token ids padded on the left, and where they are real."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def pressed(model: Any, ids: list[int], press: Any = None) -> CacheReader:
    """Read a text, under a press if there is one."""
    cache = DynamicCache()
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
    if press is None:
        model.model(input_ids=torch.tensor([ids]), past_key_values=cache)
    else:
        with press(model):
            model.model(input_ids=torch.tensor([ids]), past_key_values=cache)
    return CacheReader(model, cache, len(ids))


@torch.no_grad()
def main() -> None:
    """Command line."""
    command = parser(__doc__)
    command.add_argument("--presses", nargs="+", default=list(PRESSES), choices=list(PRESSES), help="which presses")
    options = command.parse_args()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    found = Measurement(options, AutoTokenizer.from_pretrained(options.model))
    pressed(model, found.texts[0]["ids"])  # the first pass of a process is slower than the others
    for text in found.texts:
        started = time.perf_counter()
        whole = pressed(model, text["ids"])
        found.add("full", 1.0, whole, time.perf_counter() - started, text)
        found.add("none", 0.0, pressed(model, found.said["before"] or text["ids"][:1]), 0.0, text)
        for name in options.presses:
            for budget in options.budgets:
                press, started = PRESSES[name](1 - budget, len(text["ids"])), time.perf_counter()
                reader = pressed(model, text["ids"], press)
                found.add(name, budget, reader, time.perf_counter() - started, text)
    found.save()


if __name__ == "__main__":
    main()
