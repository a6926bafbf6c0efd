"""Queries per second from one memory, against keeping the whole context.

Every query is answered by greedy generation of a fixed number of tokens. `memory` runs the memory vectors once as
a prefix; `context read again` puts the whole context before every query; `KV-cache kept` has run the context once
and repeats its keys and values for the queries. The latter two use the same weights with fused attention. What
happens once for each context (`prepare`: the write, or the pass over the context) is timed apart.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

import gradmem
from benchmarks.common import Row, machine, measure, paper_model, parser, plain_model, report
from gradmem.backbone import Backbone
from gradmem.batch import Tokens
from gradmem.experiments.cost import seconds
from gradmem.generation import generate
from gradmem.memory import Memory
from gradmem.model import MemoryModel
from gradmem.prefix import Prefix

Ids = list[list[int]]


class Way(ABC):
    """A way to answer queries about one context.

    Parameters
    ----------
    model : MemoryModel
    backbone : Backbone
        The same weights with fused attention.
    context : Tokens, shape (1, length)
    options : dict
        How to generate.
    """

    name: ClassVar[str]
    chunk: ClassVar[int] = 250
    """Queries at once: each carries the whole context."""

    def __init__(self, model: MemoryModel, backbone: Backbone, context: Tokens, options: Row) -> None:
        self.method, self.backbone, self.context = model.method, backbone, context
        self.tokenizer, self.pad_id, self.options = model.task.tokenizer, model.task.pad_id, options

    @abstractmethod
    def prepare(self) -> Any:
        """Do what is done once for a context, and return what is kept of it."""

    @abstractmethod
    def size(self, kept: Any) -> int:
        """Bytes of what is kept."""

    @abstractmethod
    def generate(self, kept: Any, queries: Ids) -> Ids:
        """Answer queries in one batch."""

    def answer(self, kept: Any, queries: Ids) -> Ids:
        """Answer queries, at most `chunk` in a batch."""
        starts = range(0, len(queries), self.chunk)
        return [row for i in starts for row in self.generate(kept, queries[i : i + self.chunk])]


class FromMemory(Way):
    """Write once, answer from the memory."""

    name = "memory"
    chunk = 1000

    def prepare(self) -> Memory:
        """Write the context."""
        return self.method.write(self.context).memory

    def size(self, kept: Memory) -> int:
        """Bytes of the memory's tensors."""
        return sum(size(tensor) for tensor in kept.tensors.values())

    def generate(self, kept: Memory, queries: Ids) -> Ids:
        """Run the memory once as a prefix, then the queries."""
        rows = torch.zeros(len(queries), dtype=torch.long)
        return self.method.generate(kept, queries, rows, pad_id=self.pad_id, **self.options)


class ReadAgain(Way):
    """Put the context before every query."""

    name = "context read again"

    def prepare(self) -> list[int]:
        """Keep the tokens."""
        ids: list[int] = self.context.ids[0].tolist()
        return ids

    def size(self, kept: list[int]) -> int:
        """Bytes of the text."""
        return len(self.tokenizer.decode(kept).encode())

    def generate(self, kept: list[int], queries: Ids) -> Ids:
        """Take context and query as one prompt, padded on the left."""
        backwards = Tokens.from_lists([(kept + query)[::-1] for query in queries], self.pad_id)
        ids, mask = backwards.ids.flip(1), backwards.mask.flip(1).long()
        made: Tensor = self.backbone.model.generate(
            input_ids=ids, attention_mask=mask, pad_token_id=self.pad_id, **self.options
        )
        answers: Ids = made[:, ids.shape[1] :].tolist()
        return answers


class FromCache(Way):
    """Run the context once and keep its keys and values."""

    name = "KV-cache kept"

    def prepare(self) -> Prefix:
        """Run the context."""
        return self.backbone.prefix(self.backbone.embed(self.context.ids))

    def size(self, kept: Prefix) -> int:
        """Bytes of keys and values."""
        return sum(size(layer.keys) + size(layer.values) for layer in kept.cache.layers)

    def generate(self, kept: Prefix, queries: Ids) -> Ids:
        """Repeat the cache for the queries."""
        rows = torch.zeros(len(queries), dtype=torch.long)
        return generate(self.backbone, kept.select(rows), queries, self.pad_id, **self.options)


WAYS: list[type[Way]] = [FromMemory, ReadAgain, FromCache]


def size(tensor: Tensor) -> int:
    """Bytes of a tensor."""
    return tensor.numel() * tensor.element_size()


def prompts(model: MemoryModel) -> tuple[Tokens, Ids]:
    """One test context and its queries without their targets."""
    batch = model.task.batch("test", 0, 1)
    return batch.context, batch.prompts()


def job(way: Way, queries: Ids, count: int, repeats: int) -> Row:
    """Measure one way at one number of queries, which repeat themselves where there are not enough."""
    asked = [queries[i % len(queries)] for i in range(count)]
    with torch.no_grad():
        prepare = seconds(way.prepare, repeats)
        kept = way.prepare()
        took = seconds(lambda: way.answer(kept, asked), repeats)
    return {
        "queries": count,
        "from": way.name,
        "seconds_median": took,
        "queries_per_s": count / took,
        "prepare_seconds": prepare,
        "bytes": way.size(kept),
    }


def agreement(one: Way, other: Way, queries: Ids) -> float:
    """Fraction of queries that two ways answer alike."""
    with torch.no_grad():
        answers = zip(one.answer(one.prepare(), queries), other.answer(other.prepare(), queries), strict=True)
        return sum(a == b for a, b in answers) / len(queries)


def main() -> None:
    """Command line."""
    command = parser(__doc__)
    command.add_argument("--checkpoint", default=None, metavar="NAME", help="model; without it random weights")
    command.add_argument("--pairs", type=int, default=32, metavar="N", help="pairs, for random weights")
    command.add_argument("--queries", type=int, nargs="+", default=[1, 10, 100, 1000], metavar="Q", help="numbers")
    command.add_argument("--new-tokens", type=int, default=4, metavar="N", help="tokens of an answer")
    options = command.parse_args()
    torch.set_num_threads(options.threads)
    where = machine(options.threads, "fp32")
    try:
        model = paper_model(options.pairs) if options.checkpoint is None else gradmem.load(options.checkpoint)
    except gradmem.GradmemError as error:
        command.error(str(error))
    model.method.eval()
    context, queries = prompts(model)
    backbone = Backbone(plain_model(model.method, "sdpa"))
    for language_model in (model.method.backbone.model, backbone.model):
        language_model.generation_config.eos_token_id = None  # No answer ends early.
    greedy = {"max_new_tokens": options.new_tokens, "do_sample": False}
    ways = [way(model, backbone, context, greedy) for way in WAYS]
    jobs = [partial(job, way, queries, count, options.repeats) for count in options.queries for way in ways]
    rows = measure("reads", jobs)
    memory = {row["queries"]: row["seconds_median"] for row in rows if row["from"] == FromMemory.name}
    for row in rows:
        row["memory_faster_by"] = row["seconds_median"] / memory[row["queries"]]
    report(f"READ, {options.new_tokens} tokens for each query", rows, where, options.json)
    alike = agreement(ways[1], ways[2], queries)
    print(f"{ways[1].name} and {ways[2].name} answer {alike:.0%} of the queries alike")


if __name__ == "__main__":
    main()
