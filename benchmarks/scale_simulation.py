"""A discrete-event simulation of many replicas that answer from memories in one database; `benchmarks.scale` runs it.

A request asks one memory. Its popularity is Zipf's: the memory of rank r is asked in proportion to r^-zipf. A ring with
`POINTS` points for each replica says which replica has the memory. If `FULL` requests wait there, the next replica of
the ring takes it (consistent hashing with bounded loads). The replica answers one request at a time, in order. If its
cache has no prefix of the memory it gets the memory from the database first, which answers `connections` requests at a
time. WRITE has workers of its own, with one queue, and puts into the same database.

What is not simulated one by one: memories. Those of one node that were asked before are not kept in a list; instead a
memory of share p is in the cache with probability 1 - exp(-p T), where T requests fill the caches (Che's approximation
of a least-recently-used cache). A list is kept only of memories that a spilled request or a lost node brought to
another replica: they are cold there, and leave its cache when nobody has asked for them while T requests came.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import simpy
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

POINTS = 64
"""Points of each replica on the ring."""
FULL = 8
"""Requests at a replica, by default, from which on the next one of the ring takes a request."""
NEIGHBOURS = 8
"""Replicas of the ring that may take a request."""
EXACT = 100_000
"""Most popular memories that have a share of their own; the others are put together into bins."""
BURST = 2.0
"""Rate of a bursty trace within a burst, as a multiple of its mean; a fourth of the time is a burst."""
BURST_LENGTH = 5.0
"""Mean length of a burst, in mean service times."""


@dataclass(frozen=True)
class Times:
    """Measured seconds, from which each request draws."""

    cached: Floats
    """READ whose prefix is in the cache."""
    uncached: Floats
    """READ that runs the prefix first, without the database."""
    write: Floats
    get: Floats
    """The database's: a memory by its id, with its bytes."""
    put: Floats


@dataclass(frozen=True)
class Setting:
    """What is simulated."""

    replicas: int
    memories: int
    cache: int
    """Prefixes that a replica keeps."""
    load: float = 0.6
    """Share of the time that a replica is busy, if all are busy alike."""
    trace: Literal["poisson", "bursty"] = "poisson"
    requests: int = 20_000
    writes: float = 0.01
    """Share of the requests that write."""
    zipf: float = 0.8
    connections: int = 16
    network: float = 0.001
    """Seconds of a request on the network, there and back."""
    lost: bool = False
    """One replica ends in the middle of the run and does not come back."""
    full: int = FULL
    detection: float = 2.0
    """Seconds until requests go elsewhere."""
    rate: float | None = None
    """Requests a second; by default what gives `load`."""
    seed: int = 0


@dataclass
class Outcome:
    """What came out of a run; the first fifth of the requests is left out."""

    setting: Setting
    rate: float
    arrived: Floats
    latency: Floats
    """Seconds of each READ, in the order of arrival."""
    write_latency: Floats
    hits: float
    expected_hits: float
    """Of Che's approximation, without spills and losses."""
    spilled: float
    retried: int
    busy: dict[str, float]
    """Share of the time that each kind of resource is busy, or would have to be."""
    lost_at: float | None
    recovery: float
    """Seconds until a cold cache has nine tenths of its hit rate."""

    def quantile(self, q: float) -> float:
        """Seconds within which this share of the reads are answered."""
        return float(np.quantile(self.latency, q))


@lru_cache(8)
def popularity(memories: int, zipf: float) -> tuple[Floats, Floats, Floats]:
    """Share of one memory, number of memories, and first rank, of each bin of memories that are asked about alike."""
    exact = np.arange(1, min(memories, EXACT) + 1, dtype=float)
    edges = np.unique(np.geomspace(EXACT + 1, memories + 1, 400).round()) if memories > EXACT else np.array([])
    first = np.concatenate([exact, edges[:-1]])
    count = np.concatenate([np.ones_like(exact), np.diff(edges)])
    share = (first + (count - 1) / 2) ** -zipf
    return share / (share * count).sum(), count, first


def characteristic_time(memories: int, zipf: float, kept: float) -> float:
    """Requests that fill caches of `kept` memories together: T of Che's approximation."""
    share, count, _ = popularity(memories, zipf)
    if kept >= memories:
        return np.inf
    low, high = 0.0, 1.0
    while (count * -np.expm1(-share * high)).sum() < kept:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (count * -np.expm1(-share * middle)).sum() < kept else (low, middle)
    return high


def hit_rate(memories: int, zipf: float, requests: float) -> float:
    """Share of requests that find a memory that was asked in the last so many requests."""
    share, count, _ = popularity(memories, zipf)
    return float((count * share * -np.expm1(-share * requests)).sum())


def warming(memories: int, zipf: float, kept: float, share: float = 0.9) -> float:
    """Requests until cold caches have this share of their hit rate."""
    full = characteristic_time(memories, zipf, kept)
    low, high = 0.0, min(full, 1e3 * memories)
    wanted = share * hit_rate(memories, zipf, high)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if hit_rate(memories, zipf, middle) < wanted else (low, middle)
    return high


@lru_cache(8)
def ring(replicas: int) -> tuple[NDArray[np.uint64], Ints]:
    """Points of a hash ring, sorted, and the next different replicas from each: shape (points, NEIGHBOURS)."""
    digests = [hashlib.sha256(f"{replica}/{n}".encode()).digest() for replica in range(replicas) for n in range(POINTS)]
    points = np.array([int.from_bytes(digest[:8], "big") for digest in digests], dtype=np.uint64)
    order = points.argsort()
    owners = (np.arange(len(points)) // POINTS)[order]
    around, wanted = np.concatenate([owners, owners]).tolist(), min(NEIGHBOURS, replicas)
    nexts = np.zeros((len(points), wanted), dtype=np.int64)
    for at in range(len(points)):
        found: dict[int, None] = {}
        end = at
        while len(found) < wanted:
            found[around[end]] = None
            end += 1
        nexts[at] = list(found)
    return points[order], nexts


def places(ranks: Ints, points: NDArray[np.uint64]) -> Ints:
    """The point of the ring of each memory."""
    mixed = ranks.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # the hash of a number (splitmix64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.searchsorted(points, mixed ^ (mixed >> np.uint64(31))) % len(points)


def arrivals(trace: str, count: int, rate: float, service: float, draw: np.random.Generator) -> Floats:
    """Times at which requests arrive, at this rate on average."""
    if trace == "poisson":
        return draw.exponential(1 / rate, count).cumsum()
    low, mean_length = (1 - BURST / 4) / (3 / 4), BURST_LENGTH * service
    steps, high = [], False
    now, made = 0.0, 0
    while made < count:
        length = draw.exponential(mean_length if high else 3 * mean_length)
        times = now + draw.uniform(0, length, draw.poisson(length * rate * (BURST if high else low)))
        steps.append(np.sort(times))
        now, made, high = now + length, made + len(times), not high
    return np.concatenate(steps)[:count]


class Simulation:
    """One run of a setting."""

    def __init__(self, setting: Setting, times: Times) -> None:
        self.setting, draw = setting, np.random.default_rng(setting.seed)
        kept = setting.cache * setting.replicas
        full = characteristic_time(setting.memories, setting.zipf, kept)
        self.expected_hits = hit_rate(setting.memories, setting.zipf, full)
        missed = 1 - self.expected_hits
        read = self.expected_hits * times.cached.mean() + missed * (times.uncached.mean() + times.get.mean())
        reads = 1 - setting.writes
        self.rate = setting.rate or setting.load * setting.replicas / read / reads
        count = setting.requests
        self.at = arrivals(setting.trace, count, self.rate, read, draw)
        share, number, first = popularity(setting.memories, setting.zipf)
        bins = np.searchsorted((share * number).cumsum(), draw.random(count) * (share * number).sum())
        bins = bins.clip(max=len(share) - 1)
        self.rank = (first[bins] + draw.random(count) * number[bins]).astype(np.int64)
        self.warm = draw.random(count) < -np.expm1(-share[bins] * full)
        self.writes = draw.random(count) < setting.writes
        points, self.nexts = ring(setting.replicas)
        self.place = places(self.rank, points)
        self.drawn = {name: draw.choice(values, count) for name, values in vars(times).items()}
        self.means = {name: float(values.mean()) for name, values in vars(times).items()}
        # As many writers as are busy as long as replicas are.
        self.writers = max(1, int(np.ceil(self.rate * setting.writes * self.means["write"] / setting.load)))
        full_time = warming(setting.memories, setting.zipf, kept) / self.rate
        self.forgotten = full / self.rate  # seconds in which a memory that nobody asks leaves its cache
        self.recovery, self.lost_at = full_time, float(self.at[count // 2]) if setting.lost else None
        self.victim = int(np.bincount(self.nexts[self.place, 0], minlength=setting.replicas).argmax())
        self.moved: dict[tuple[int, int], float] = {}
        self.there: set[simpy.Process] = set()
        self.latency = np.full(count, np.nan)
        self.hit = np.zeros(count, dtype=bool)
        self.spilled = self.retried = 0
        self.busy = {"replica": np.zeros(setting.replicas), "database": np.zeros(1), "writers": np.zeros(1)}

    def run(self) -> Outcome:
        """Simulate all requests."""
        env = self.env = simpy.Environment()
        self.replicas = [simpy.Resource(env) for _ in range(self.setting.replicas)]
        self.database = simpy.Resource(env, self.setting.connections)
        self.writing = simpy.Resource(env, self.writers)
        env.process(self._arrive())
        if self.lost_at is not None:
            env.process(self._lose(self.lost_at))
        env.run()
        settled = np.arange(len(self.at)) >= len(self.at) // 5
        counted = settled & ~self.writes
        span, busy = self.at[-1], self.busy
        told = {
            "replicas": busy["replica"].mean() / span,
            "database": float(busy["database"][0]) / span / self.setting.connections,
            "writers": float(busy["writers"][0]) / span / self.writers,
        }
        return Outcome(
            setting=self.setting,
            rate=self.rate,
            arrived=self.at[counted],
            latency=self.latency[counted],
            write_latency=self.latency[settled & self.writes],
            hits=float(self.hit[counted].sum() / max(1, counted.sum())),
            expected_hits=self.expected_hits,
            spilled=self.spilled / len(self.at),
            retried=self.retried,
            busy=told,
            lost_at=self.lost_at,
            recovery=self.recovery,
        )

    def hottest(self) -> float:
        """Load of the replica whose own memories are asked most, if none of its requests went elsewhere."""
        own = np.zeros(self.setting.replicas)
        spent = np.where(self.warm, self.means["cached"], self.means["uncached"] + self.means["get"])
        np.add.at(own, self.nexts[self.place, 0], np.where(self.writes, 0, spent))
        return float(own.max() / self.at[-1])

    def _arrive(self) -> Generator[Any, Any, None]:
        env = self.env
        for number, at in enumerate(self.at.tolist()):
            yield env.timeout(max(0.0, at - env.now))
            env.process(self._write(number) if self.writes[number] else self._read(number))

    def _lose(self, at: float) -> Generator[Any, Any, None]:
        yield self.env.timeout(at)
        for process in list(self.there):
            process.interrupt()

    def _write(self, number: int) -> Generator[Any, Any, None]:
        env, began = self.env, self.env.now
        yield env.timeout(self.setting.network)
        with self.writing.request() as turn:
            yield turn
            took = self.drawn["write"][number]
            self.busy["writers"][0] += took
            yield env.timeout(took)
        yield from self._query("put", number)
        self.latency[number] = env.now - began

    def _query(self, what: str, number: int) -> Generator[Any, Any, None]:
        with self.database.request() as turn:
            yield turn
            took = self.drawn[what][number]
            self.busy["database"][0] += took
            yield self.env.timeout(took)

    def _read(self, number: int) -> Generator[Any, Any, None]:
        env, began = self.env, self.env.now
        yield env.timeout(self.setting.network)
        while True:
            replica = self._chosen(number)
            try:
                yield from self._at(replica, number)
                break
            except simpy.Interrupt:
                self.retried += 1
                if self.lost_at is not None:
                    yield env.timeout(max(0.0, self.lost_at + self.setting.detection - env.now))
        self.latency[number] = env.now - began

    def _chosen(self, number: int) -> int:
        known = self.lost_at is not None and self.env.now >= self.lost_at + self.setting.detection
        near = [one for one in self.nexts[self.place[number]].tolist() if not (known and one == self.victim)]
        for one in near:
            if self.replicas[one].count + len(self.replicas[one].queue) < self.setting.full:
                break
        else:
            one = min(near, key=lambda one: len(self.replicas[one].queue))
        self.spilled += one != near[0]
        return int(one)

    def _at(self, replica: int, number: int) -> Generator[Any, Any, None]:
        env, me = self.env, self.env.active_process
        assert me is not None
        if replica == self.victim and self.lost_at is not None:
            if env.now >= self.lost_at:
                raise simpy.Interrupt("lost")
            self.there.add(me)
        try:
            with self.replicas[replica].request() as turn:
                yield turn
                began, hit = env.now, self._finds(replica, number)
                self.hit[number] = hit
                if not hit:
                    yield from self._query("get", number)
                yield env.timeout(self.drawn["cached" if hit else "uncached"][number])
                self.busy["replica"][replica] += env.now - began
        finally:
            self.there.discard(me)

    def _finds(self, replica: int, number: int) -> bool:
        if replica == self.nexts[self.place[number], 0]:
            return bool(self.warm[number])
        key = int(self.rank[number]), replica
        found = self.env.now - self.moved.get(key, -np.inf) <= self.forgotten
        self.moved[key] = self.env.now
        return found
