"""Documents a second of `gradmem write-corpus`, and what a kill in the middle costs.

The documents are stories that the task of the checkpoint `babi` makes up, all different. First they are written by one
command, which is killed (SIGKILL, all of its processes) when half of them are on the disk, and by the same command
again: each story must then be there once, and a sample of the memories is asked what the stories say. Then a part of
them is written anew by each number of workers. `not the model` is the share of the workers' time, from the start of the
command to its end, that is not spent in the model; `writing` counts from when the first worker is started.

Before that, one writer by itself, without Ray, writes some stories three times: the median of its processor time, which
other work on the machine does not lengthen much, and of the share of its time outside the model. With `--documents 0`
that is all.
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq

import gradmem
from benchmarks.common import Row, machine, parser, report
from gradmem.corpus.destination import from_parquet, to_parquet
from gradmem.corpus.documents import Document
from gradmem.corpus.options import Options
from gradmem.corpus.text_writer import TextWriter

CHECKPOINT = "babi"
ASKED = 200
"""Memories that are asked."""
ALONE, REPEATS = 48, 3
"""Stories that one writer writes by itself, and how often."""
Story = tuple[str, list[tuple[str, str]]]


def stories(count: int) -> dict[str, Story]:
    """Different stories with their questions, by name."""
    task = gradmem.load(CHECKPOINT).task
    found: dict[str, Story] = {}
    seed = 0
    while len(found) < count:
        made = task.example(seed)
        seed += 1
        if made is not None:
            found.setdefault(made[0], made)
    return {f"story {number}": story for number, story in enumerate(found.values())}


def command(source: Path, out: Path, said: Path, workers: int | None) -> list[str]:
    """The command that is measured."""
    words = ["write-corpus", str(source), "--checkpoint", CHECKPOINT, "--out", str(out), "--json", str(said)]
    return [sys.executable, "-m", "gradmem", *words, *(["--workers", str(workers)] if workers else [])]


def names(out: Path) -> list[str]:
    """Names of all memories in a folder of shards."""
    return [
        name for shard in out.glob("*.parquet") for name in pq.read_table(shard, columns=["name"])["name"].to_pylist()
    ]


def killed(words: list[str], out: Path, count: int) -> Row:
    """Run a command and kill it when it has written so many documents; say how many there are then."""
    began, process = time.perf_counter(), subprocess.Popen(words)
    while process.poll() is None and sum(pq.read_metadata(one).num_rows for one in out.glob("*.parquet")) < count:
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(5)  # Ray ends its processes when it misses the one that started them
    seconds = time.perf_counter() - began
    return {"run": "killed", "workers": "all", "written": len(names(out)), "seconds": seconds}


def told(run: str, said: Path) -> Row:
    """What the report of a run says."""
    found = json.loads(said.read_text())
    rates = {
        "documents/s": found["documents_per_second"],
        "writing, documents/s": found["written"] / found["phases"]["write"],
    }
    model = {
        "model, ms/document": 1000 * found["model_seconds"] / found["written"],
        "not the model": found["not_model"],
    }
    counts = {key: found[key] for key in ("workers", "written", "skipped", "failed", "seconds")}
    return {"run": run, **counts, **rates, **model}


def right(out: Path, made: dict[str, Story]) -> float:
    """Share of right answers, of some of the memories."""
    model = gradmem.load(CHECKPOINT)
    asked = answered = 0
    rows = [row for shard in sorted(out.glob("*.parquet")) for row in from_parquet(shard)]
    for row in rows[:: max(1, len(rows) // ASKED)]:
        memory, questions = model.bind(gradmem.Memory.from_bytes(row["memory"])), made[row["name"]][1]
        found = memory.ask([question for question, _ in questions])
        asked += len(questions)
        answered += sum(answer == wanted for answer, (_, wanted) in zip(found, questions, strict=True))
    return answered / asked


def alone(made: dict[str, Story]) -> Row:
    """What one writer takes for each story, by processor time, and which share of its time is not the model's."""
    writer = TextWriter(Options(CHECKPOINT))
    read = [Document(name, name=name, text=text) for name, (text, _) in made.items()]
    processor, share = [], []
    for _ in range(REPEATS):
        began, clock, writer.model_seconds = time.process_time(), time.perf_counter(), 0.0
        prepared = [writer.prepare(number, document) for number, document in enumerate(read)]
        to_parquet([memory for _, memory in writer.write(prepared) if not isinstance(memory, str)])
        processor.append(1000 * (time.process_time() - began) / len(read))
        share.append(1 - writer.model_seconds / (time.perf_counter() - clock))
    about = {"processor, ms/document": statistics.median(processor), "not the model": statistics.median(share)}
    return {"run": "a writer alone", "workers": 1, "written": len(read), **about}


def main() -> None:
    """Measure, check and report."""
    options = parser(__doc__, repeats=None)
    options.add_argument("--documents", type=int, default=10_000, metavar="N", help="stories to write")
    options.add_argument("--part", type=int, default=2_000, metavar="N", help="stories for each number of workers")
    options.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="numbers of workers to compare")
    given = options.parse_args()
    where, made = machine(1, "fp32"), stories(max(ALONE, given.documents))
    rows = [alone(dict(list(made.items())[:ALONE]))]
    if given.documents:
        rows += runs(made, given.part, given.workers)
    report(f"{given.documents:,} stories", rows, where, given.json)


def runs(made: dict[str, Story], size: int, workers: list[int]) -> list[Row]:
    """Write all stories in two runs, the first of which is killed, and a part of them with each number of workers."""
    with tempfile.TemporaryDirectory() as folder:
        whole, part, said = Path(folder) / "whole.jsonl", Path(folder) / "part.jsonl", Path(folder) / "report.json"
        lines = [json.dumps({"name": name, "text": story[0]}) + "\n" for name, story in made.items()]
        whole.write_text("".join(lines))
        part.write_text("".join(lines[:size]))
        out = Path(folder) / "out"
        rows = [killed(command(whole, out, said, None), out, len(made) // 2)]
        subprocess.run(command(whole, out, said, None), check=True)
        rows.append({**told("again", said), "right answers": right(out, made)})
        assert sorted(names(out)) == sorted(made), "a story is missing, or there twice"
        for count in workers:
            subprocess.run(command(part, Path(folder) / f"out{count}", said, count), check=True)
            rows.append(told("a part", said))
    return rows


if __name__ == "__main__":
    main()
