"""Exact match by the place of a pair in its context: which pairs a memory keeps when it cannot keep all."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import gradmem
from benchmarks.common import Row, machine, measure, parser, report
from gradmem.evaluation.figures import figure
from gradmem.model.build import build_task

BATCH = 50


@torch.no_grad()
def by_place(checkpoint: str, pairs: int, samples: int, seed: int) -> Tensor:
    """Share of test contexts whose i-th pair is answered, shape (pairs,)."""
    model = gradmem.load(checkpoint)
    task = build_task({**model.spec["task"], "pairs": pairs})
    answered = []
    for start in range(0, samples, BATCH):
        batch = task.batch("test", start, min(BATCH, samples - start), seed)
        memory = model.method.write(batch.context).memory
        logits = model.method.read_targets(memory, batch)
        match = task.judge(logits, batch)["exact_match"]  # of the pairs of a context in their order
        answered.append(match.double().view(-1, pairs))
    return torch.cat(answered).mean(0)


def main() -> None:
    """Command line."""
    command = parser(__doc__, repeats=None)
    command.add_argument("checkpoints", nargs="+", help="names of packaged checkpoints, or directories")
    command.add_argument("--pairs", type=int, default=16, metavar="N", help="pairs of a context")
    command.add_argument("--samples", type=int, default=200, metavar="N", help="test contexts")
    command.add_argument("--seed", type=int, default=1, help="of the contexts")
    command.add_argument("--figure", type=Path, metavar="FILE", help="draw the shares to this file")
    options = command.parse_args()
    torch.set_num_threads(options.threads)
    found: dict[str, list[float]] = {}

    def job(checkpoint: str) -> Row:
        path = Path(checkpoint)
        name = path.parent.name if path.name == "checkpoint" else path.name
        shares = found[name] = (100 * by_place(checkpoint, options.pairs, options.samples, options.seed)).tolist()
        half = len(shares) // 2
        return {
            "checkpoint": name,
            "pairs": options.pairs,
            "samples": options.samples,
            "seed": options.seed,
            "exact match, %": sum(shares) / len(shares),
            "first half, %": sum(shares[:half]) / half,
            "second half, %": sum(shares[half:]) / (len(shares) - half),
            "by place, %": " ".join(f"{share:.0f}" for share in shares),
        }

    rows = measure("places", [partial(job, checkpoint) for checkpoint in options.checkpoints])
    report("exact match by place", rows, machine(options.threads, "fp32"), options.json)
    if options.figure:
        with figure(options.figure) as axis:
            for name, shares in found.items():
                axis.plot(range(1, len(shares) + 1), shares, marker=".", label=name)
            axis.set(xlabel="place of the pair in its context", ylabel="exact match, %", ylim=(-3, 103))
            axis.set_title(f"{options.pairs} pairs; {options.samples} contexts, seed {options.seed}")
            axis.legend(frameon=False, fontsize=8)
        print(f"saved {options.figure}")


if __name__ == "__main__":
    main()
