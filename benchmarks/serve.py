"""Queries per second and latency with many clients, each query about one of many memories.

Every client asks the next query as soon as its last one is answered, with the evidence that `BoundMemory.answer` gives.
`one at a time` answers them in turn, `engine` those that wait together in one batch. `memory` is the checkpoint; `full
context` keeps the KV-cache of every context, in a model of the same shape with random weights, which are as fast as
others. Every memory is asked once before the clock starts: no prefix is run while it runs.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
import torch

import gradmem
from benchmarks.common import Row, machine, measure, parser, report
from gradmem.model import BoundMemory, MemoryModel
from gradmem.serving import Engine

Ask = Callable[[int, str], object]
"""Answers a query about a memory by its number."""


@contextmanager
def one_at_a_time(model: MemoryModel, memories: list[BoundMemory]) -> Iterator[Ask]:
    """Answer in turn; each memory keeps its prefix."""
    turn = threading.Lock()

    def ask(number: int, query: str) -> object:
        with turn:
            return memories[number].answer(query)

    yield ask


@contextmanager
def engine(model: MemoryModel, memories: list[BoundMemory]) -> Iterator[Ask]:
    """Answer together what waits."""
    with Engine(model) as running:
        yield lambda number, query: running.ask(number, memories[number], query).result()


WAYS = {"one at a time": one_at_a_time, "engine": engine}


def write(model: MemoryModel, contexts: int) -> tuple[list[BoundMemory], list[list[str]]]:
    """Memories of test contexts, and the queries about each."""
    batch = model.task.batch("test", 0, contexts)
    written = model.write([model.task.text(ids.tolist()) for ids in batch.context.ids])
    queries: list[list[str]] = [[] for _ in range(contexts)]
    for prompt, row in zip(batch.prompts(), batch.rows.tolist(), strict=True):
        queries[row].append(model.task.text(prompt))
    return [written[row] for row in range(contexts)], queries


def load(ask: Ask, queries: list[list[str]], clients: int, seconds: float) -> Row:
    """Let clients ask for some seconds; what each query took, and all of it."""
    latencies: list[float] = []
    started = time.perf_counter()

    def client(seed: int) -> None:
        draw = random.Random(seed)
        while time.perf_counter() < started + seconds:
            number, begin = draw.randrange(len(queries)), time.perf_counter()
            ask(number, draw.choice(queries[number]))
            latencies.append(time.perf_counter() - begin)

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    return {"latencies": latencies, "seconds": time.perf_counter() - started}


def summary(setting: tuple[int, str, str], rounds: list[Row]) -> Row:
    """Latency and throughput over all rounds of a setting."""
    latencies = [latency for one in rounds for latency in one["latencies"]]
    p50, p99 = (float(q) for q in np.quantile(latencies, [0.5, 0.99]) * 1000)
    return {
        **dict(zip(("clients", "from", "way"), setting, strict=True)),
        "queries": len(latencies),
        "queries_per_s": len(latencies) / sum(one["seconds"] for one in rounds),
        "p50_ms": p50,
        "p99_ms": p99,
    }


def main() -> None:
    """Command line."""
    command = parser(__doc__, repeats=2)
    command.add_argument("--checkpoint", default="kv-32", metavar="NAME", help="model")
    command.add_argument("--memories", type=int, default=64, metavar="N", help="different memories")
    command.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64], metavar="C", help="at a time")
    command.add_argument("--seconds", type=float, default=5.0, metavar="S", help="for each run")
    options = command.parse_args()
    torch.set_num_threads(options.threads)
    where = machine(options.threads, "fp32")
    model = gradmem.load(options.checkpoint)
    torch.manual_seed(0)
    full = MemoryModel.from_spec(model.spec["task"], model.spec["backbone"], {"name": "full_context"})
    full.method.eval()
    asks: dict[tuple[str, str], tuple[Ask, list[list[str]]]] = {}
    with ExitStack() as stack:
        for kept, one in (("memory", model), ("full context", full)):
            memories, queries = write(one, options.memories)
            for way, serving in WAYS.items():
                ask = stack.enter_context(serving(one, memories))
                with ThreadPoolExecutor(options.memories) as pool:
                    list(pool.map(ask, range(options.memories), [asked[0] for asked in queries]))
                asks[kept, way] = ask, queries
        settings = [(clients, *served) for clients in options.clients for served in asks]
        # Round by round, so that what else the machine does falls on all settings alike.
        runs = [s for _ in range(options.repeats) for s in settings]
        jobs = [partial(load, *asks[kept, way], clients, options.seconds) for clients, kept, way in runs]
        rounds = measure("serving", jobs)
    rows = [summary(s, [one for run, one in zip(runs, rounds, strict=True) if run == s]) for s in settings]
    for row, base in zip(rows, [rows[i - i % len(WAYS)] for i in range(len(rows))], strict=True):
        row["queries_per_s_ratio"] = row["queries_per_s"] / base["queries_per_s"]
    report(f"{options.checkpoint}, {options.memories} memories, closed loop", rows, where, options.json)


if __name__ == "__main__":
    main()
