"""What the benchmarks share: models, clocks, memory, a description of the machine, tables and JSON."""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.shapes import PAPER_BACKBONE
from gradmem.methods import Method
from gradmem.model import MemoryModel

Precision = Literal["fp32", "bf16"]
Row = dict[str, Any]
T = TypeVar("T")


def paper_model(pairs: int, queries: int | None = None) -> MemoryModel:
    """Build the paper's model (1.07 M parameters, 8 vectors, a write head) with fixed random weights.

    Parameters
    ----------
    pairs : int
        Key-value pairs in a context.
    queries : int, optional
        Queries for each context; by default one for every pair.
    """
    torch.manual_seed(0)
    task: dict[str, Any] = {"name": "kv", "pairs": pairs}
    if queries is not None:
        task["queries"] = queries
    method = {"name": "gradmem", "n_mem": 8, "write_head": "copy", "inner_lr": 1.0}
    return MemoryModel.from_spec(task, PAPER_BACKBONE, method)


def plain_model(method: Method, attention: Literal["eager", "sdpa"]) -> PreTrainedModel:
    """Copy a method's backbone into the Hugging Face model as transformers builds it."""
    ours = method.backbone.model
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(ours.config), attn_implementation=attention)
    plain.load_state_dict(ours.state_dict())
    return plain.eval()


def autocast(precision: Precision) -> torch.autocast:
    """Matrix products in this precision; fp32 changes nothing."""
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


def parser(description: str | None, repeats: int | None = 10) -> argparse.ArgumentParser:
    """Command line with the options that every benchmark has; without repeats where nothing is timed."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--threads", type=int, default=cores(), metavar="N", help="threads of PyTorch")
    if repeats is not None:
        made.add_argument("--repeats", type=int, default=repeats, metavar="N", help="timed runs after a warm-up")
    made.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the rows here too")
    return made


def in_fresh_process(function: Callable[..., T], *arguments: object) -> T:
    """Call a module's function in a process of its own, so that no earlier run has left memory behind."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def matmul_peak(precision: Precision = "fp32", size: int = 2048, repeats: int = 10) -> float:
    """Fastest large square matrix product on this machine, in FLOP/s (2 n^3 for each)."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = torch.randn(2, size, size).to(dtype)
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(threads: int, precision: str) -> Row:
    """Where and how the numbers were measured; `load` is the machine's at the time of the call."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": cores(),
        "torch": torch.__version__,
        "threads": threads,
        "precision": precision,
        "load": round(os.getloadavg()[0], 2),
    }


def measure(title: str, jobs: Sequence[Callable[[], T]]) -> list[T]:
    """Run the jobs one after the other under a progress bar."""
    with Progress(console=Console(stderr=True), transient=True) as progress:
        return [job() for job in progress.track(jobs, description=title)]


def report(title: str, rows: list[Row], where: Row, file: Path | None) -> None:
    """Print the rows as a table and write them, each with its machine, to `file`.

    Parameters
    ----------
    where : dict
        What `machine` returned before the measurement.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    caption = ", ".join(f"{key} {value}" for key, value in where.items())
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for name in names:
        justify: Literal["left", "right"] = "right" if _numeric(rows, name) else "left"
        table.add_column(name.replace("_", " "), justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*(_shown(row.get(name)) for name in names))
    console = Console()
    Console(width=console.width if console.is_terminal else 140).print(table)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps([{**row, "machine": where} for row in rows], indent=1) + "\n")


def _numeric(rows: list[Row], name: str) -> bool:
    return all(isinstance(row.get(name, 0), int | float) for row in rows)


def _shown(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
