"""Cost of writing and asking in seconds, FLOPs and bytes."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..device import clock
from ..methods.base import Method
from ..tasks.base import Task


@dataclass(frozen=True)
class Cost:
    """Cost of writing one context and of one query to it.

    Attributes
    ----------
    write_seconds, write_flops
        Cost of writing the context.
    query_seconds, query_flops
        Cost of generating one answer when all queries of the context are asked at once.
    queries : int
        Number of queries asked at once.
    bytes : int
        Size of the memory.
    """

    write_seconds: float
    write_flops: float
    query_seconds: float
    query_flops: float
    queries: int
    bytes: int


def measure(method: Method, task: Task, repeats: int = 5) -> Cost:
    """Measure writing one test context and asking all its queries, by greedy generation.

    Parameters
    ----------
    method : Method
    task : Task
    repeats : int
        Timed runs, after one that is not timed; the median counts.
    """
    batch = task.batch("test", 0, 1).to(method.device)
    queries = batch.prompts()
    # No answer may end early, so that all systems generate the same number of tokens.
    options = {**task.greedy_options(), "min_new_tokens": task.answer_length}

    def write() -> Any:
        return method.write(batch.context).memory

    def ask() -> Any:
        return method.generate(memory, queries, batch.rows, pad_id=task.pad_id, **options)

    with torch.no_grad():
        memory = write()
        return Cost(
            write_seconds=seconds(write, repeats),
            write_flops=flops(write),
            query_seconds=seconds(ask, repeats) / len(queries),
            query_flops=flops(ask) / len(queries),
            queries=len(queries),
            bytes=memory.nbytes,
        )


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a run, after one that is not timed, including its work on an accelerator."""
    run()
    times = []
    for _ in range(repeats):
        started = clock()
        run()
        times.append(clock() - started)
    return statistics.median(times)


def flops(run: Callable[[], Any]) -> float:
    """Count the floating-point operations of matrix products, convolutions and attention in a run."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())
