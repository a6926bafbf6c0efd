"""What a command costs before and beside its work: `gradmem list`, `--help`, and `ask` on a small memory of `kv-32`.

Each runs in processes of its own, whose files the system has in memory after a first run that is not counted. Processor
seconds are those of the process, user and system together, which other work on the machine changes less than the clock.
The last two rows say what is none of ours: importing PyTorch, and generating three tokens with a model of the same size
that transformers builds by itself. --importtime FILE keeps what `python -X importtime` says of `ask`.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import gradmem
from benchmarks.common import Row, machine, measure, parser, report
from gradmem.store import Store

TRANSFORMERS = """
import gc
gc.disable()
import torch
from transformers import LlamaConfig, LlamaForCausalLM
shape = dict(vocab_size=68, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4)
model = LlamaForCausalLM(LlamaConfig(**shape)).eval()
model.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=3, do_sample=False, pad_token_id=0)
"""


def commands(folder: Path) -> dict[str, list[str]]:
    """What is timed, as arguments of Python."""
    memory, store = folder / "m.safetensors", folder / "store.db"
    written = gradmem.load("kv-32").write("a7:Qz\nk2:9f\nzz:aa")
    written.save(memory)
    with Store(store) as keeper:
        keeper.put(written, name="notes")
    ours = {
        "gradmem list": ["list"],
        "gradmem --help": ["--help"],
        "gradmem write --help": ["write", "--help"],
        "gradmem keys ls": ["keys", "ls"],
        "gradmem store ls": ["store", "ls"],
        "gradmem inspect FILE": ["inspect", str(memory)],
        "gradmem ask FILE a7": ["ask", str(memory), "a7"],
    }
    return {
        "import gradmem": ["-c", "import gradmem"],
        **{name: ["-m", "gradmem", *arguments] for name, arguments in ours.items()},
        "import torch": ["-c", "import torch"],
        "transformers alone": ["-c", TRANSFORMERS],
    }


def timed(name: str, arguments: list[str], folder: Path, repeats: int) -> Row:
    """Run a command several times; medians."""
    environment = {**os.environ, "GRADMEM_STORE": str(folder / "store.db"), "GRADMEM_KEYS": str(folder / "keys.json")}
    processor, clock = [], []
    for _ in range(repeats + 1):
        before, started = os.times(), time.perf_counter()
        subprocess.run([sys.executable, *arguments], env=environment, check=True, stdout=subprocess.DEVNULL)
        after = os.times()
        clock.append(time.perf_counter() - started)
        processor.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return {
        "command": name,
        "processor_seconds": statistics.median(processor[1:]),
        "least": min(processor[1:]),
        "wall_seconds": statistics.median(clock[1:]),
    }


def main() -> None:
    """Time the commands and print a table."""
    command = parser(__doc__, repeats=5)
    command.add_argument("--importtime", type=Path, default=None, metavar="FILE", help="keep what it says of `ask`")
    options = command.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    where = machine(options.threads, "fp32")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        found = commands(folder)
        rows = measure(
            "starting",
            [partial(timed, name, arguments, folder, options.repeats) for name, arguments in found.items()],
        )
        if options.importtime:
            ask = [sys.executable, "-X", "importtime", *found["gradmem ask FILE a7"]]
            options.importtime.write_bytes(subprocess.run(ask, check=True, capture_output=True).stderr)
    report(f"start-up, median of {options.repeats} runs", rows, where, options.json)


if __name__ == "__main__":
    main()
