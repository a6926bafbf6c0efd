"""What the parts share: the card, time limits, tables and files."""

from __future__ import annotations

import contextlib
import csv
import json
import platform
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import transformers

from gradmem.experiments.cost import seconds
from gradmem.training.precision import matmul_precision

Row = dict[str, Any]
STARTED = time.perf_counter()
ONLY: set[str] = set()
"""Parts to run; all where it is empty."""
SEEN: set[str] = set()
"""Parts that there are."""


def device() -> torch.device:
    """The accelerator, or the CPU where there is none, to try the plan out."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else found


def machine() -> Row:
    """Where the numbers were measured."""
    about: Row = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        about |= {"card": properties.name, "memory_gb": round(properties.total_memory / 1e9, 1)}
        about |= {"cuda": torch.version.cuda, "driver": _driver()}
    else:
        about["card"] = f"none ({platform.processor() or platform.machine()})"
    return about


def _driver() -> str:
    path = Path("/proc/driver/nvidia/version")
    words = path.read_text().split() if path.exists() else []
    return next((word for word in words if word[:1].isdigit() and word.count(".") >= 1), "unknown")


def say(text: str) -> None:
    """Print a line with the seconds since the start."""
    print(f"[{time.perf_counter() - STARTED:6.1f}] {text}", flush=True)


class TooLong(BaseException):
    """A part has had its time; no handler for ordinary errors may take it for one."""


@contextlib.contextmanager
def limit(limit_seconds: float) -> Iterator[None]:
    """End what runs inside after so many seconds."""

    def end(*_: object) -> None:
        raise TooLong(f"more than {limit_seconds:.0f} seconds")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, limit_seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def part(name: str, run: Callable[[], list[Row]], out: Path, limit_seconds: float) -> list[Row]:
    """Run a part within its time, print its rows and save them; what fails is said, and the next part goes on."""
    SEEN.add(name)
    if ONLY and name not in ONLY:
        return []
    say(f"{name}: begins, {limit_seconds:.0f} s at most")
    rows: list[Row] = []
    try:
        with limit(limit_seconds):
            rows = run()
    except TooLong as error:
        say(f"{name}: ended after {error}")
        rows = [{"error": f"ended after {error}"}]
    except Exception as error:
        traceback.print_exc()
        say(f"{name}: failed: {type(error).__name__}: {str(error)[:300]}")
        rows = [{"error": f"{type(error).__name__}: {error}"}]
    finally:
        save(name, rows, out)
    for row in rows:
        say(f"  {name}: " + ", ".join(f"{key} {shown(value)}" for key, value in row.items()))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return rows


def save(name: str, rows: list[Row], out: Path) -> None:
    """Write rows as JSON, with the machine, and as CSV."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    fields = list(dict.fromkeys(key for row in rows for key in row))
    with (out / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)


def shown(value: object) -> str:
    """A value for people."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def timed(run: Callable[[], Any], repeats: int = 3) -> tuple[float, float]:
    """Median seconds of a run after one that does not count, and its peak memory in GB beyond what was in use."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        run()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        took = seconds(run, repeats)
        return took, (torch.cuda.max_memory_allocated() - before) / 1e9
    return seconds(run, repeats), 0.0


def synchronize() -> None:
    """Wait for the accelerator, where there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def products(precision: Any) -> AbstractContextManager[None]:
    """TF32 for float32 products on the card, or exact ones."""
    return matmul_precision(precision, device())
