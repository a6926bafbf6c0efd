"""Intervals, and when writing once is cheaper."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gradmem.evaluation.result import break_even, interval


@pytest.mark.parametrize(
    "costs", [(5.0, 1.0, 0.0, 2.0), (5.0, 1.0, 1.0, 2.5), (1.0, 1.0, 2.0, 1.0), (3.0, 2.0, 0.0, 2.0)]
)
def test_break_even_is_where_the_sums_cross(costs: tuple[float, float, float, float]) -> None:
    write, query, other_write, other_query = costs
    cheaper = [n for n in range(1, 100) if write + n * query <= other_write + n * other_query]
    assert break_even(*costs) == (cheaper[0] if cheaper else math.inf)


def test_the_interval_of_a_statistic_has_its_values_under_resampling() -> None:
    pairs = np.random.default_rng(0).random((50, 2)) + 1

    def ratio(scores: np.ndarray) -> float:
        return float(scores[:, 0].mean() / scores[:, 1].mean())

    low, high = interval(pairs, statistic=ratio)
    spread = [ratio(pairs[np.random.default_rng(n).integers(50, size=50)]) for n in range(1000)]
    assert low < ratio(pairs) < high
    assert (low, high) == pytest.approx(tuple(np.quantile(spread, [0.025, 0.975])), abs=0.02)
    assert interval(np.ones((5, 2)), statistic=ratio) == (1.0, 1.0)
