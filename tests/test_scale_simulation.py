"""The simulation of many replicas against queueing theory, an exact cache, and what must hold when a node is lost."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
from benchmarks.scale_simulation import Setting, Simulation, Times, arrivals, characteristic_time, hit_rate, ring

MEAN = 0.01
NEVER = np.array([0.0])
ALONE = Setting(replicas=1, memories=100, cache=100, writes=0.0, network=0.0, requests=40_000)


def exponential(seed: int, mean: float = MEAN) -> np.ndarray:
    return np.random.default_rng(seed).exponential(mean, 200_000)


def erlang_c(servers: int, offered: float) -> float:
    """The probability that a request waits in M/M/c; `offered` is arrivals times the mean service."""
    full = offered**servers / math.factorial(servers) * servers / (servers - offered)
    return full / (sum(offered**k / math.factorial(k) for k in range(servers)) + full)


def times(**given: np.ndarray) -> Times:
    return Times(**{"cached": NEVER, "uncached": NEVER, "write": NEVER, "get": NEVER, "put": NEVER, **given})


@pytest.mark.parametrize("load", [0.3, 0.6])
def test_one_replica_is_an_m_m_1_queue(load: float) -> None:
    """Time in the system is exponential, with the rate by which service is faster than arrivals."""
    service = exponential(1)
    ran = Simulation(replace(ALONE, rate=load / MEAN), times(cached=service)).run()
    rest = (1 - load) / MEAN
    assert ran.latency.mean() == pytest.approx(1 / rest, rel=0.08)
    assert ran.quantile(0.5) == pytest.approx(math.log(2) / rest, rel=0.08)
    assert ran.quantile(0.99) == pytest.approx(math.log(100) / rest, rel=0.15)
    assert ran.busy["replicas"] == pytest.approx(load, rel=0.05)


def test_writers_are_an_m_m_c_queue() -> None:
    """The mean wait is that of Erlang's C formula."""
    setting = replace(ALONE, writes=1.0, rate=4 * 0.8 / MEAN, load=0.85)
    simulation = Simulation(setting, times(write=exponential(2)))
    assert simulation.writers == 4
    offered = setting.rate * MEAN
    wait = erlang_c(4, offered) / (4 / MEAN - setting.rate)
    assert simulation.run().write_latency.mean() == pytest.approx(MEAN + wait, rel=0.08)


def test_ten_replicas_share_what_one_hash_gives_them() -> None:
    """Ten queues that are not joined: the same load as one of them, with equally many requests at each."""
    service = times(cached=np.array([MEAN]))
    one, ten = (Simulation(replace(ALONE, replicas=n, memories=100_000, cache=10**6), service).run() for n in (1, 10))
    assert one.latency.mean() == pytest.approx(MEAN * (1 + 0.6 / 2 / 0.4), rel=0.05)  # Pollaczek and Khinchine: M/D/1
    assert ten.rate == pytest.approx(10 * one.rate)
    assert ten.busy["replicas"] == pytest.approx(0.6, rel=0.05)


def test_the_hit_rate_is_that_of_a_cache_that_forgets_the_least_recently_used() -> None:
    memories, kept, zipf = 500, 50, 0.8
    shares = np.arange(1, memories + 1) ** -zipf
    cache: OrderedDict[int, None] = OrderedDict()
    hits = []
    for one in np.random.default_rng(3).choice(memories, 40_000, p=shares / shares.sum()).tolist():
        hits.append(one in cache)
        cache[one] = None
        cache.move_to_end(one)
        if len(cache) > kept:
            cache.popitem(last=False)
    expected = hit_rate(memories, zipf, characteristic_time(memories, zipf, kept))
    assert expected == pytest.approx(np.mean(hits[5000:]), abs=0.02)
    setting = replace(ALONE, memories=memories, cache=kept)
    ran = Simulation(setting, times(cached=np.array([MEAN]), uncached=np.array([MEAN]))).run()
    assert ran.hits == pytest.approx(expected, abs=0.02)


def test_memories_in_bins_are_asked_as_often_as_one_by_one() -> None:
    many = np.arange(1, 1_000_001) ** -0.8
    expected = (many / many.sum() * -np.expm1(-many / many.sum() * 10**6)).sum()
    assert hit_rate(1_000_000, 0.8, 10**6) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("trace", ["poisson", "bursty"])
def test_traces_have_the_rate_that_is_asked_for(trace: str) -> None:
    at = arrivals(trace, 200_000, 50.0, 0.01, np.random.default_rng(4))
    assert len(at) == 200_000
    assert (np.diff(at) >= 0).all()
    assert len(at) / at[-1] == pytest.approx(50, rel=0.05)
    spread = np.bincount((at / 0.4).astype(int))
    dispersion = spread.var() / spread.mean()  # 1 for Poisson
    assert dispersion == pytest.approx(1, abs=0.1) if trace == "poisson" else dispersion > 1.5


def test_a_ring_names_different_replicas() -> None:
    points, nexts = ring(5)
    assert (np.diff(points.astype(object)) > 0).all()
    assert all(sorted(row) == [0, 1, 2, 3, 4] for row in nexts.tolist())


def test_a_lost_replica_costs_retries_and_time_but_no_answer() -> None:
    service = times(cached=np.array([MEAN]), uncached=np.array([3 * MEAN]))
    setting = Setting(replicas=4, memories=1000, cache=100, writes=0.0, requests=8000, load=0.5, detection=0.5)
    calm, lost = (Simulation(replace(setting, lost=lost), service).run() for lost in (False, True))
    assert calm.retried == 0
    assert 0 < lost.retried < 0.5 * lost.rate
    assert not np.isnan(lost.latency).any()
    around = (lost.arrived > lost.lost_at) & (lost.arrived < lost.lost_at + 0.5)
    assert lost.latency[around].max() > 0.4
    assert calm.latency.max() < 0.4
    assert lost.hits < calm.hits
