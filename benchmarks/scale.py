"""How far replicas and one database go: measured here for one and two replicas, simulated beyond.

Measured with each checkpoint, on one thread: WRITE, READ whose prefix is kept, READ that runs the prefix first, and get
and put of a memory in the store. With the first checkpoint also what replicas (processes of one thread each) do
together, and what a query takes at them when they come as in a trace: the simulation gets the same trace and the
measured service times, and both are shown side by side. The large settings take the service times of the last
checkpoint. `scale_simulation.py` says what is simulated and how; the store is SQLite in a temporary folder unless
--place gives another one, which must be empty.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
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


def seconds(call: Callable[[int], object], count: int) -> Floats:
    """Seconds of each of some calls, after two that do not count."""
    took = []
    for number in (0, 0, *range(count)):
        began = time.perf_counter()
        call(number)
        took.append(time.perf_counter() - began)
    return np.array(took[2:])


def service(model: MemoryModel, place: str, writes: int, reads: int) -> tuple[Times, int, list[str], list[str]]:
    """Measure a model and a store; also bytes of a prefix, and ids of stored memories with their questions."""
    made, questions = texts(model, reads)
    write = seconds(lambda n: model.write(made[n]), writes)
    written = [model.write(text) for text in made[:writes]]
    memories, asked = (lambda n: written[n % writes]), (lambda n: questions[n % writes])
    cached = seconds(lambda n: memories(n).ask(asked(n)), reads)
    uncached = seconds(lambda n: bound(model, memories(n)).ask(asked(n)), reads)
    with Store(place) as store:
        ids: list[str] = []
        put = seconds(lambda n: ids.append(store.put(renamed(memories(n), len(ids))).id), max(reads, 50))
        get = seconds(lambda n: store.load(ids[n % len(ids)]), max(reads, 50))
    times = Times(cached=cached, uncached=uncached, write=write, get=get, put=put)
    return times, written[0].prefix.nbytes, ids[2:], [asked(n) for n in range(len(ids) - 2)]


def renamed(memory: BoundMemory, number: int) -> gradmem.Memory:
    """A copy that the store takes for another memory: it is as if another text had been written."""
    tensors = {
        name: tensor + number * 1e-6 if tensor.is_floating_point() else tensor
        for name, tensor in memory.tensors.items()
    }
    return gradmem.Memory(tensors, memory.receipts)


def replica(line: Connection, checkpoint: str, place: str, kept: int, ids: list[str], questions: list[str]) -> None:
    """Answer queries in the order in which they come, in a process of its own, with the prefixes of `kept` memories."""
    torch.set_num_threads(1)
    model, cache, done = gradmem.load(checkpoint), OrderedDict[int, BoundMemory](), list[tuple[int, float, bool]]()
    with Store(place) as store:

        def ask(number: int) -> bool:
            found = number in cache
            if not found:
                cache[number] = bound(model, store.load(ids[number]))
            cache.move_to_end(number)
            cache[number].ask(questions[number])
            if len(cache) > kept:
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
                line.send(_asked_for(float(number), lambda n: ask(n % min(kept, len(ids)))))
            else:
                found = ask(number)
                done.append((request, time.monotonic(), found))


def _asked_for(span: float, ask: Callable[[int], object]) -> float:
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


def together(count: int, span: float, *given: Any) -> Row:
    """Reads a second of replicas that are asked without a pause."""
    with replicas(count, *given) as lines:
        for line in lines:
            line.send(("busy", span))
        rates = [float(line.recv()) for line in lines]
    return {"replicas": count, "reads_per_s": sum(rates)}


def checked(count: int, load: float, requests: int, kept: int, times: Times, *given: Any) -> Row:
    """Send a trace to replicas, and simulate the same trace with what service took in this run or before it."""
    ids = given[-2]
    setting = Setting(count, len(ids), kept, load, requests=requests, writes=0.0, network=0.0, full=10**9)
    trace = Simulation(setting, times)
    owners = trace.nexts[trace.place, 0]
    with replicas(count, *given) as lines:
        start = time.monotonic() + 0.2
        for number, at in enumerate(trace.at.tolist()):
            time.sleep(max(0.0, start + at - time.monotonic()))
            lines[owners[number]].send((number, int(trace.rank[number]) - 1))
        for line in lines:
            line.send(("report", 0))
        done = sorted(one for line in lines for one in line.recv())
    counted = done[requests // 5 :]
    latency = np.array([end - start - trace.at[number] for number, end, _ in counted])
    ran = trace.run()
    real = {"p50_ms": np.quantile(latency, 0.5), "p99_ms": np.quantile(latency, 0.99)}
    row: Row = {"replicas": count, "load": load, "requests": requests, "queries_per_s": ran.rate}
    row |= {f"measured_{name}": float(value) * 1000 for name, value in real.items()}
    row |= {"simulated_p50_ms": ran.quantile(0.5) * 1000, "simulated_p99_ms": ran.quantile(0.99) * 1000}
    return row | {"measured_hits": float(np.mean([hit for *_, hit in counted])), "simulated_hits": ran.hits}


def settings(kept: int, most: int) -> list[Setting]:
    """The large settings."""
    sizes = [size for size in (1, 2, 10, 100, 1000) if size <= most]
    one = Setting(1, MEMORIES_EACH, kept)
    made = [replace(one, replicas=n, memories=n * MEMORIES_EACH, requests=max(20_000, 60 * n)) for n in sizes]
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
    row |= {"bottleneck": ran.bottleneck, "capacity_per_s": ran.capacity}
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


def rows_of(checkpoint: str, times: Times) -> list[Row]:
    """Rows of the service times of a checkpoint."""
    rows = []
    for what, took in vars(times).items():
        p50, p99 = (float(np.quantile(took, q)) * 1000 for q in (0.5, 0.99))
        rows.append(
            {"checkpoint": checkpoint, "what": what, "samples": len(took), "mean_ms": float(took.mean()) * 1000}
        )
        rows[-1] |= {"p50_ms": p50, "p99_ms": p99}
    return rows


def main() -> None:
    """Command line."""
    command = parser(__doc__, repeats=None)
    command.set_defaults(threads=1)
    command.add_argument(
        "--checkpoints", nargs="+", default=["kv-16", "english"], metavar="NAME", help="what to measure"
    )
    command.add_argument("--reads", type=int, nargs="+", default=[200, 8], metavar="N", help="of each checkpoint")
    command.add_argument("--writes", type=int, nargs="+", default=[40, 3], metavar="N", help="of each checkpoint")
    command.add_argument("--workers", type=int, nargs="+", default=None, metavar="N", help="default: 1 to 8 by cores")
    command.add_argument("--requests", type=int, default=1500, metavar="N", help="of the trace for each check")
    command.add_argument("--load", type=float, default=0.5, metavar="X", help="of the check")
    command.add_argument("--seconds", type=float, default=5.0, metavar="S", help="of each measurement of throughput")
    command.add_argument("--most", type=int, default=1000, metavar="N", help="most simulated replicas")
    command.add_argument("--place", default=None, metavar="URL", help="empty store")
    command.add_argument("--figure", type=Path, default=None, metavar="FILE", help="draw it here")
    options = command.parse_args()
    torch.set_num_threads(options.threads)
    where = machine(options.threads, "fp32")
    workers = options.workers or [n for n in (1, 2, 4, 8) if n <= cores()]
    tables: dict[str, list[Row]] = {"service": []}
    with tempfile.TemporaryDirectory() as folder:
        for name, reads, writes in zip(options.checkpoints, options.reads, options.writes, strict=True):
            place = options.place or str(Path(folder) / f"{name}.db")
            times, size, ids, questions = service(gradmem.load(name), place, writes, reads)
            tables["service"] += rows_of(name, times)
            if name == options.checkpoints[0]:
                given = name, place, 16, ids[:64], questions[:64]
                jobs = [partial(together, n, options.seconds, *given) for n in workers]
                tables["throughput"] = measure("replicas", jobs)
                checks = [partial(checked, n, options.load, options.requests, 16, times, *given) for n in workers]
                tables["check"] = measure("traces", checks)
    large = settings(max(1, CACHE_BYTES // size), options.most)
    tables["simulation"] = measure("simulating", [partial(lambda one: simulated(one, times)[1], one) for one in large])
    for title, rows in tables.items():
        report(title, rows, where, None)
    print(f"a replica of the large settings keeps {CACHE_BYTES // size:,} prefixes of {size:,} bytes")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**tables, "prefix_bytes": size, "machine": where}, indent=1) + "\n")
    if options.figure:
        figure(tables["simulation"], options.figure)


if __name__ == "__main__":
    main()
