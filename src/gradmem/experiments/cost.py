"""Cost of writing and asking in seconds, FLOPs and bytes, and the number of queries from which writing once pays."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

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
        started = _now()
        run()
        times.append(_now() - started)
    return statistics.median(times)


def _now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def flops(run: Callable[[], Any]) -> float:
    """Count the floating-point operations of matrix products, convolutions and attention in a run."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def break_even(write: float, query: float, other_write: float, other_query: float) -> float:
    """Smallest number of queries for which writing once is cheaper than another way.

    Parameters
    ----------
    write, query : float
        Cost of writing a context, and of a query to its memory.
    other_write, other_query : float
        Cost of what the other way does once for a context, and of each query to it.

    Returns
    -------
    float
        A whole number, at least 1, or infinity if writing is never cheaper.
    """
    if write + query <= other_write + other_query:
        return 1.0
    saved = other_query - query
    return math.ceil((write - other_write) / saved) if saved > 0 else math.inf
