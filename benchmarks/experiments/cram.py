"""How much text a vector holds, when a frozen language model is written without any training.

Each number of memory vectors writes the same chunks of text until their loss is low or the steps are over, and reads
them back token by token, from the memory alone. Beside it stands what else keeps a text: gzip, and the model's
key-value cache. Seconds are processor time.
"""

from __future__ import annotations

import argparse
import gzip
import statistics
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

import gradmem
from benchmarks.common import Row, machine, measure, parser, report
from gradmem.memory import Precision
from gradmem.model import BoundMemory, MemoryModel


def read_chunks(model: MemoryModel, files: list[Path], tokens: int, chunk: int) -> list[str]:
    """The same number of neighbouring chunks from the middle of each file, `tokens` in all."""
    each = tokens // chunk // len(files)
    found = []
    for file in files:
        text = file.read_text(encoding="utf-8")
        middle = text.index(". ", len(text) // 2) + 2
        found += model.encoder.chunks(text[middle : middle + 20 * chunk * each], chunk)[:each]
    return found


def right(model: MemoryModel, memory: BoundMemory, texts: list[str]) -> list[float]:
    """For each row: tokens that come back right, as a fraction."""
    scores = []
    for given, back in zip(map(model.task.encode, texts), memory.reconstruct(), strict=True):
        scores.append(sum(a == b for a, b in zip(given, back, strict=True)) / len(given))
    return scores


def job(name: str, texts: list[str], n_mem: int, until: float, steps: int) -> Row:
    """Write all chunks with so many vectors each, and read them back."""
    model = MemoryModel.from_language_model(name, {"name": "cram", "n_mem": n_mem})
    started = time.process_time()
    memory = model.write(texts, until=until, max_steps=steps, progress=partial(show, n_mem))
    took = (time.process_time() - started) / torch.get_num_threads()
    tokens = sum(record.context_tokens for record in memory.receipts)
    rounded: list[Precision] = ["float16", "int8"]
    scores = {
        "float32": right(model, memory, texts),
        **{precision: right(model, memory.rounded(precision), texts) for precision in rounded},
    }
    unwritten = right(model, model.write(texts, steps=0), texts)
    swapped = right(model, memory.select([*range(1, len(texts)), 0]), texts)
    return {
        "n_mem": n_mem,
        "tokens_per_vector": tokens / len(texts) / n_mem,
        "right_pct": 100 * statistics.mean(scores["float32"]),
        "exact_chunks": sum(score == 1 for score in scores["float32"]),
        "chunks": len(texts),
        "float16_pct": 100 * statistics.mean(scores["float16"]),
        "int8_pct": 100 * statistics.mean(scores["int8"]),
        "unwritten_pct": 100 * statistics.mean(unwritten),
        "swapped_pct": 100 * statistics.mean(swapped),
        "steps_median": statistics.median(record.steps for record in memory.receipts),
        "loss": statistics.mean(record.loss_after for record in memory.receipts),
        "seconds_a_chunk": took / len(texts),
        "bytes_float16": memory.nbytes // 2,
    }


def show(n_mem: int, steps: Iterable[Any], title: str = "", total: int | None = None) -> Iterable[Any]:
    """Steps under a progress bar that says of how many vectors."""
    return track(steps, f"{n_mem} vectors, {title}", total)


def main() -> None:
    """Command line."""
    command: argparse.ArgumentParser = parser(__doc__, repeats=None)
    command.add_argument("files", type=Path, nargs="+", metavar="FILE", help="texts, of which the middle is taken")
    command.add_argument("--model", default="smollm2-135m", help="directory, hub name or GGUF file")
    command.add_argument("--tokens", type=int, default=1024, metavar="N", help="tokens in all")
    command.add_argument("--chunk-size", type=int, default=128, metavar="N", help="tokens of a chunk")
    command.add_argument("--n-mem", type=int, nargs="+", default=[2, 4, 8, 16], metavar="M", help="vectors a chunk")
    command.add_argument("--steps", type=int, default=300, metavar="K", help="most steps")
    command.add_argument("--until", type=float, default=0.05, metavar="LOSS", help="loss at which a chunk stops, nats")
    options = command.parse_args()
    torch.set_num_threads(options.threads)
    where = machine(options.threads, "fp32")
    try:
        model = MemoryModel.from_language_model(options.model, {"name": "cram"})
        texts = read_chunks(model, options.files, options.tokens, options.chunk_size)
    except (gradmem.GradmemError, OSError, ValueError) as error:
        command.error(str(error))
    joined = "".join(texts).encode()
    print(f"text: {len(joined):,} bytes; gzip: {len(gzip.compress(joined)):,}, chunk by chunk: ", end="")
    print(f"{sum(len(gzip.compress(text.encode())) for text in texts):,}; ", end="")
    caches = (model.method.backbone.cache_bytes(torch.tensor([model.task.encode(text)])) for text in texts)
    print(f"key-value cache, float32: {sum(caches):,} bytes")
    jobs = [partial(job, options.model, texts, n, options.until, options.steps) for n in options.n_mem]
    rows = measure("cram", jobs)
    report(f"{options.model}, chunks of {options.chunk_size} tokens, until {options.until}", rows, where, options.json)


if __name__ == "__main__":
    main()
