"""How far replicas and one database go: measured here for one and two replicas, simulated beyond.

Measured with each checkpoint, on one thread: WRITE, READ whose prefix is kept, READ that runs the prefix first, and get
and put of a memory in the store. With the first checkpoint also what replicas (processes of one thread each) do
together, and what a query takes at them when they come as in a trace: the simulation gets the same trace and the
service times of that run, and both are shown side by side. The large settings take the last checkpoint's service
times, as processor time: what else the machine does does not change it. `scale_simulation.py` says what is simulated
and how. The store is SQLite in a temporary folder unless --place gives another one, which must be empty.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gradmem
from benchmarks.common import Row, cores, machine, measure, parser, report
from benchmarks.scale_simulation import Floats, Outcome, Setting, Simulation, Times
from gradmem.model import BoundMemory, MemoryModel
from gradmem.store import Store

STORY = (
    "Day {0}. In the morning {1} walked down to the harbour with a basket of apples and met the old fisherman, who was "
    "mending his nets in the sun. They talked about the storm of last week and about the lighthouse, whose lamp had "
    "been out for two nights. At noon {1} put the {2} key into the {3} and went home over the hill, where the goats "
    "were grazing. In the evening it rained, and nobody went out any more."
)
NAMES, COLOURS, PLACES = ("Anna", "Boris", "Clara", "David"), ("red", "green", "brass"), ("drawer", "kettle", "barn")
CACHE_BYTES = 4 * 2**30
"""Bytes of prefixes that a replica keeps in the large settings."""
STORED, KEPT = 64, 16
"""Memories of the check, and prefixes that a replica keeps in it."""
MEMORIES_EACH = 100_000
"""Memories for each replica in the large settings."""


def texts(model: MemoryModel, count: int) -> tuple[list[str], list[str]]:
    """Texts to write, and a question about each."""
    if model.spec["task"]["name"] == "kv":
        batch = model.task.batch("test", 0, count)
        first = {row: prompt for prompt, row in zip(batch.prompts(), batch.rows.tolist(), strict=True)}
        return [model.task.text(ids.tolist()) for ids in batch.context.ids], [
            model.task.text(first[row]) for row in range(count)
        ]
    made = [STORY.format(n, NAMES[n % 4], COLOURS[n % 3], PLACES[n // 4 % 3]) for n in range(count)]
    return made, ["Where is the key?"] * count


def bound(model: MemoryModel, memory: Any) -> BoundMemory:
    """The memory with its model, without the prefix that it may have kept."""
    return BoundMemory(memory.tensors, memory.receipts, model=model)


def timed(call: Callable[[int], Any], count: int) -> tuple[Floats, Floats, list[Any]]:
    """Run some calls after one that does not count: seconds by the clock, seconds of the processor, and results."""
    wall, processor, results = [], [], []
    for number in (0, *range(count)):
        began, busy = time.perf_counter(), time.process_time()
        results.append(call(number))
        wall.append(time.perf_counter() - began)
        processor.append(time.process_time() - busy)
    return np.array(wall[1:]), np.array(processor[1:]), results[1:]


@dataclass
class Measured:
    """A checkpoint and a store, measured."""

    wall: Times
    processor: Times
    prefix_bytes: int
    ids: list[str]
    """Of memories in the store."""
    questions: list[str]
    """One about each of them."""


def service(model: MemoryModel, place: str, writes: int, reads: int) -> Measured:
    """Measure a model and a store."""
    made, questions = texts(model, writes)
    write = timed(lambda n: model.write(made[n]), writes)
    written = write[2]
    took = {"write": write, "cached": timed(lambda n: written[n % writes].ask(questions[n % writes]), reads)}
    took["uncached"] = timed(lambda n: bound(model, written[n % writes]).ask(questions[n % writes]), reads)
    with Store(place) as store:
        numbers = count()
        puts = timed(lambda n: store.put(renamed(written[n % writes], next(numbers))).id, STORED)
        ids = puts[2]
        took |= {"put": puts, "get": timed(lambda n: store.load(ids[n]), STORED)}
    wall = Times(**{name: one[0] for name, one in took.items()})
    processor = Times(**{name: one[1] for name, one in took.items()})
    return Measured(wall, processor, written[0].prefix.nbytes, ids, [questions[n % writes] for n in range(STORED)])


def renamed(memory: BoundMemory, number: int) -> gradmem.Memory:
    """A copy that the store takes for another memory: it is as if another text had been written."""
    tensors = {
        name: tensor + number * 1e-6 if tensor.is_floating_point() else tensor
        for name, tensor in memory.tensors.items()
    }
    return gradmem.Memory(tensors, memory.receipts)


def replica(line: Connection, checkpoint: str, place: str, ids: list[str], questions: list[str]) -> None:
    """Answer queries in the order in which they come, in a process of its own, with the last prefixes."""
    torch.set_num_threads(1)
    model, cache, done = (
        gradmem.load(checkpoint),
        OrderedDict[int, BoundMemory](),
        list[tuple[int, float, float, bool]](),
    )
    with Store(place) as store:

        def ask(number: int) -> bool:
            found = number in cache
            if not found:
                cache[number] = bound(model, store.load(ids[number]))
            cache.move_to_end(number)
            cache[number].ask(questions[number])
            if len(cache) > KEPT:
                cache.popitem(last=False)
            return found

        ask(0)
        line.send("ready")
        while (job := line.recv()) is not None:
            request, number = job
            if request == "report":
                line.send(done)
                done = []
            elif request == "busy":
                line.send(_a_second(float(number), lambda n: ask(n % KEPT)))
            else:
                began = time.monotonic()
                found = ask(number)
                done.append((request, began, time.monotonic(), found))


def _a_second(span: float, ask: Callable[[int], object]) -> float:
    """Calls a second, one after the other."""
    began, count = time.monotonic(), 0
    while time.monotonic() < began + span:
        ask(count)
        count += 1
    return count / (time.monotonic() - began)


@contextmanager
def replicas(count: int, *given: Any) -> Iterator[list[Connection]]:
    """Start replicas; yield the lines to them."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(count)]
    processes = [context.Process(target=replica, args=(theirs, *given), daemon=True) for _, theirs in pipes]
    for process in processes:
        process.start()
    lines = [line for line, _ in pipes]
    try:
        for line in lines:
            line.recv()
        yield lines
    finally:
        for line, process in zip(lines, processes, strict=True):
            line.send(None)
            process.join(20)


def check(workers: int, options: argparse.Namespace, *given: Any) -> tuple[Row, Row]:
    """What replicas read without a pause, and what queries of a trace take, measured and simulated."""
    with replicas(workers, *given) as lines:
        for line in lines:
            line.send(("busy", options.seconds))
        each = sum(float(line.recv()) for line in lines) / workers
        setting = Setting(workers, STORED, KEPT, requests=options.requests, writes=0.0, network=0.0, full=10**9)
        setting = replace(setting, rate=options.load * workers * each)
        always = np.array([1 / each])
        trace = Simulation(setting, Times(always, always, always, always, always))
        owners = trace.nexts[trace.place, 0]
        start = time.monotonic() + 0.2
        for number, at in enumerate(trace.at.tolist()):
            time.sleep(max(0.0, start + at - time.monotonic()))
            lines[owners[number]].send((number, int(trace.rank[number]) - 1))
        for line in lines:
            line.send(("report", 0))
        done = sorted(one for line in lines for one in line.recv())
    took = {found: np.array([end - began for _, began, end, hit in done if hit == found]) for found in (True, False)}
    nothing = np.array([0.0])  # a replica counts what it waits for the store as its own time
    ran = Simulation(setting, Times(took[True], took[False], nothing, nothing, nothing)).run()
    counted = done[len(done) // 5 :]
    latency = np.array([end - start - trace.at[number] for number, _, end, _ in counted])
    row: Row = {"replicas": workers, "load": options.load, "requests": len(done), "queries_per_s": ran.rate}
    for q in (0.5, 0.99):
        row |= {f"measured_p{q * 100:.0f}_ms": float(np.quantile(latency, q)) * 1000}
        row |= {f"simulated_p{q * 100:.0f}_ms": ran.quantile(q) * 1000}
    row |= {"measured_hits": float(np.mean([hit for *_, hit in counted])), "simulated_hits": ran.hits}
    return {"replicas": workers, "reads_per_s": workers * each}, row


def settings(kept: int, most: int) -> list[Setting]:
    """The large settings."""
    sizes = [size for size in (1, 2, 10, 100, 1000) if size <= most]
    one = Setting(1, MEMORIES_EACH, kept)
    made = [replace(one, replicas=n, memories=n * MEMORIES_EACH, requests=max(20_000, 100 * n)) for n in sizes]
    bursty = [replace(setting, trace="bursty") for setting in made]
    return [*made, *bursty, *(replace(setting, lost=True) for setting in made if setting.replicas >= 10)]


def simulated(setting: Setting, times: Times) -> tuple[Outcome, Row]:
    """Simulate a setting; what its row of the table says."""
    simulation = Simulation(setting, times)
    ran, hottest = simulation.run(), simulation.hottest()
    row: Row = {"replicas": setting.replicas, "memories": setting.memories, "trace": setting.trace}
    row |= {"queries_per_s": ran.rate, "p50_s": ran.quantile(0.5), "p99_s": ran.quantile(0.99)}
    row |= {"write_p99_s": float(np.quantile(ran.write_latency, 0.99)), "hits": ran.hits, "spilled": ran.spilled}
    row |= {f"{name}_busy": share for name, share in ran.busy.items()} | {"hottest_alone": hottest}
    row["replicas_that_fill_the_database"] = int(setting.replicas / ran.busy["database"])
    if ran.lost_at is not None:
        since = ran.arrived - ran.lost_at
        around = ran.latency[(since >= 0) & (since < 10 * setting.detection)]
        row |= {"retried": ran.retried, "p99_s_around": float(np.quantile(around, 0.99)), "warm_after_s": ran.recovery}
    return ran, row


def figure(rows: list[Row], file: Path) -> None:
    """Draw latency and hits against the number of replicas."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    _, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for trace in ("poisson", "bursty"):
        some = [row for row in rows if row["trace"] == trace and "retried" not in row]
        sizes = [row["replicas"] for row in some]
        for name, style in (("p50_s", "o--"), ("p99_s", "o-")):
            left.plot(sizes, [row[name] for row in some], style, label=f"{trace}, {name[:3]}")
        right.plot(sizes, [row["database_busy"] for row in some], "o-", label=f"database, {trace}")
    calm = [row for row in rows if row["trace"] == "poisson" and "retried" not in row]
    right.plot(
        [row["replicas"] for row in calm],
        [row["hottest_alone"] for row in calm],
        "s-",
        label="hottest replica, no spill",
    )
    right.axhline(1, color="grey", linewidth=0.8)
    left.set(xscale="log", yscale="log", xlabel="replicas", ylabel="seconds of a READ")
    right.set(xscale="log", yscale="log", xlabel="replicas", ylabel="load (1: full)")
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    pyplot.savefig(file, dpi=130)


def rows_of(checkpoint: str, measured: Measured) -> list[Row]:
    """Rows of the service times of a checkpoint."""
    rows = []
    for what, wall in vars(measured.wall).items():
        processor = vars(measured.processor)[what]
        rows.append({"checkpoint": checkpoint, "what": what, "samples": len(wall)})
        rows[-1] |= {f"p{q * 100:.0f}_ms": float(np.quantile(wall, q)) * 1000 for q in (0.5, 0.99)}
        rows[-1] |= {"mean_ms": float(wall.mean()) * 1000, "processor_mean_ms": float(processor.mean()) * 1000}
    return rows


def shown(tables: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """The tables to print: what was simulated as three of them, which are narrow enough."""
    rows = tables["simulation"]
    calm, lost = ([row for row in rows if ("retried" in row) == gone] for gone in (False, True))
    setting = ("replicas", "memories", "trace")
    latency = ("queries_per_s", "p50_s", "p99_s", "write_p99_s", "hits", "spilled")
    load = ("replicas_busy", "database_busy", "writers_busy", "hottest_alone", "replicas_that_fill_the_database")
    loss = ("p99_s", "hits", "retried", "p99_s_around", "warm_after_s")
    cut = {"simulated latency": (calm, latency), "simulated load": (calm, load), "one replica lost": (lost, loss)}
    narrow = {
        title: [{name: row[name] for name in (*setting, *names)} for row in some]
        for title, (some, names) in cut.items()
    }
    return {title: some for title, some in tables.items() if title != "simulation"} | narrow


def options_of() -> argparse.Namespace:
    """Options of the command line."""
    command = parser(__doc__, repeats=None)
    command.set_defaults(threads=1)
    both: dict[str, Any] = {"type": int, "nargs": "+", "metavar": "N"}
    command.add_argument("--checkpoints", nargs="+", default=["kv-16", "english"], metavar="NAME", help="to measure")
    command.add_argument("--reads", default=[200, 6], help="of each kind, for each checkpoint", **both)
    command.add_argument("--writes", default=[20, 2], help="for each checkpoint", **both)
    command.add_argument("--workers", default=[n for n in (1, 2, 4, 8) if n <= cores()], help="replicas here", **both)
    command.add_argument("--requests", type=int, default=600, metavar="N", help="of the trace for each check")
    command.add_argument("--load", type=float, default=0.5, metavar="X", help="of the check")
    command.add_argument("--seconds", type=float, default=5.0, metavar="S", help="of each measurement of throughput")
    command.add_argument("--most", type=int, default=1000, metavar="N", help="most simulated replicas")
    command.add_argument("--place", default=None, metavar="URL", help="empty store, whose get and put the clock times")
    command.add_argument("--figure", type=Path, default=None, metavar="FILE", help="draw it here")
    return command.parse_args()


def main() -> None:
    """Command line."""
    options = options_of()
    torch.set_num_threads(options.threads)
    where = machine(options.threads, "fp32")
    tables: dict[str, list[Row]] = {"service": []}
    with tempfile.TemporaryDirectory() as folder:
        for name, reads, writes in zip(options.checkpoints, options.reads, options.writes, strict=True):
            place = options.place or str(Path(folder) / f"{name}.db")
            measured = service(gradmem.load(name), place, writes, reads)
            tables["service"] += rows_of(name, measured)
            if name == options.checkpoints[0]:
                given = options, name, place, measured.ids, measured.questions
                checks = measure("replicas", [partial(check, number, *given) for number in options.workers])
                tables["throughput"], tables["check"] = map(list, zip(*checks, strict=True))
    size, times = measured.prefix_bytes, measured.processor
    if options.place:
        times = replace(times, get=measured.wall.get, put=measured.wall.put)
    large = settings(CACHE_BYTES // size, options.most)
    tables["simulation"] = measure("simulating", [partial(lambda one: simulated(one, times)[1], one) for one in large])
    for title, rows in shown(tables).items():
        report(title, rows, where, None)
    print(f"a replica of the large settings keeps {CACHE_BYTES // size:,} prefixes of {size:,} bytes")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**tables, "prefix_bytes": size, "machine": where}, indent=1) + "\n")
    if options.figure:
        figure(tables["simulation"], options.figure)


if __name__ == "__main__":
    main()
