"""The result of a measurement: exact match with its interval, its controls and its conditions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np


@dataclass
class Result:
    """Exact match over all queries of each context, and the conditions under which it was measured.

    Attributes
    ----------
    steps : int
        Write steps.
    exact_match : float
        Mean over contexts of the fraction of queries answered exactly, 0 to 1.
    ci95 : tuple of float
        95 % interval, bootstrapped over contexts.
    write_loss : float
        Mean write loss of the memory that is read, nats per token.
    unwritten, swapped : float
        Controls, which should be at chance: exact match from the memory before any step, and from memories of
        other contexts after `swapped_steps` steps.
    n_mem, d : int
        Memory vectors, mean over contexts, and their width; n_mem is 0 if the memory does not consist of vectors.
    bytes : int
        Bytes of one memory after the most steps, mean over contexts.
    label, source : str
        Name of the task for people, and where its contexts come from: "generated", or the name of their data.
    method : dict
        Options of the method that differ from the checkpoint's, such as `{"chunk": 113}`.
    metrics : dict of float
        The task's other metrics, averaged as exact match is; their controls are `unwritten_NAME`, `swapped_NAME`.
    intervals : dict of tuple
        95 % intervals, as `ci95`, of the controls `unwritten` and `swapped` and of all `metrics`.
    from_context : bool
        Whether WRITE begins with something of the context. The memory before any step is then no control, and
        `unwritten` is the memory of no text.
    """

    checkpoint: str
    task: dict[str, Any]
    label: str
    source: str
    steps: int
    exact_match: float
    ci95: tuple[float, float]
    write_loss: float
    unwritten: float
    swapped: float
    swapped_steps: int
    samples: int
    queries: int
    seed: int
    split: str
    parameters: int
    n_mem: int
    d: int
    bytes: int
    method: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    from_context: bool = False

    @property
    def bits_per_vector(self) -> float | None:
        """Bits of the target that each memory vector saves, if the task counts `bits`."""
        if "bits" not in self.metrics or not self.n_mem:
            return None
        return (self.metrics["unwritten_bits"] - self.metrics["bits"]) / self.n_mem

    @property
    def size(self) -> str:
        """Size of a memory in words."""
        return f"{self.n_mem} vectors of {self.d}, {self.bytes} bytes" if self.n_mem else f"{self.bytes} bytes"

    def to_dict(self) -> dict[str, Any]:
        """The result as one flat row, the task's options (such as `pairs`) among the other values."""
        fields = asdict(self)
        task, metrics, method, intervals = (fields.pop(name) for name in ("task", "metrics", "method", "intervals"))
        if self.bits_per_vector is not None:
            metrics["bits_per_vector"] = self.bits_per_vector
        return {
            "checkpoint": fields.pop("checkpoint"),
            "task": fields.pop("label"),
            **{k: v for k, v in task.items() if k != "name"},
            **fields,
            **{f"method.{name}": value for name, value in method.items()},
            **metrics,
            **{f"{name}_ci95": bounds for name, bounds in intervals.items()},
        }


def interval(
    scores: np.ndarray,
    seed: int = 0,
    resamples: int = 2000,
    statistic: Callable[[np.ndarray], float] = lambda scores: float(scores.mean()),
) -> tuple[float, float]:
    """95 % interval of the mean, or of another statistic, by bootstrap over contexts.

    Parameters
    ----------
    scores : array, shape (contexts, ...)
    seed : int
    resamples : int
    statistic : callable
        Maps the scores of contexts to a number.
    """
    random = np.random.default_rng(seed)
    found = [statistic(scores[random.integers(len(scores), size=len(scores))]) for _ in range(resamples)]
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


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
