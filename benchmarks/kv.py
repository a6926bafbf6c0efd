"""Samples per second of the KV generator: training must never wait for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.common import Row, machine, measure, parser, report
from gradmem.experiments.cost import seconds
from gradmem.tasks.kv import KV

SAMPLES = 4096


def job(pairs: int, noise: float, repeats: int) -> Row:
    """Measure one size; every run draws samples that no run has drawn before."""
    task = KV(pairs=pairs, noise=noise)
    run = iter(range(repeats + 1))
    took = seconds(lambda: task.batch("train", SAMPLES * next(run), SAMPLES), repeats)
    return {"pairs": pairs, "noise": noise, "samples_per_s": SAMPLES / took}


def main() -> None:
    """Command line."""
    command = parser(__doc__)
    command.add_argument("--pairs", type=int, nargs="+", default=[4, 32, 96], metavar="N", help="pairs")
    command.add_argument("--noise", type=float, nargs="+", default=[0.0, 0.5], metavar="F", help="noise fractions")
    options = command.parse_args()
    torch.set_num_threads(options.threads)
    where = machine(options.threads, "int64")
    jobs: list[Callable[[], Row]] = [
        partial(job, pairs, noise, options.repeats) for pairs in options.pairs for noise in options.noise
    ]
    report("KV generator", measure("samples", jobs), where, options.json)


if __name__ == "__main__":
    main()
