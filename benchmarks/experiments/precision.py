"""Does bfloat16 in the meta-gradient cost accuracy? The same training in both precisions, on the same contexts.

`kv-16` is trained further: for a single write step on 16 pairs, and for five write steps on 32. The runs are short, and
their learning rates fall to zero. All are measured on the same validation contexts. Finished runs are not repeated.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import torch

import gradmem
from benchmarks.common import Row, machine, parser, report
from gradmem.evaluation.measurement import evaluate
from gradmem.training.recipe import Stage, load_recipe
from gradmem.training.trainer import Trainer

CASES = {1: (16, 100), 5: (32, 40)}
"""Write steps K: pairs, and optimizer steps of 16 contexts."""
PRECISIONS = ("fp32", "bf16")


def trained(output: Path, write_steps: int, precision: str, seed: int) -> Path:
    """Train one arm, unless it is there; return its checkpoint."""
    directory = output / f"k{write_steps}-{precision}-{seed}"
    if not (directory / "checkpoint" / "config.json").exists():
        pairs, steps = CASES[write_steps]
        stage = Stage(steps, [write_steps], [{"pairs": pairs}], 16, warmup_steps=5, decay_steps=steps // 2)
        changes = {"optimizer": "adamw", "adamw_lr": 5e-4, "strategy": "unroll", "micro_batch_size": 8}
        recipe = load_recipe("kv-16", init_from="kv-16", seed=seed, precision=precision, valid_samples=8, **changes)
        recipe.stages = [stage]
        Trainer(recipe, directory).run()
    return directory / "checkpoint"


def measured(checkpoint: Path, write_steps: int, samples: int) -> float:
    """Exact match on validation contexts, in percent."""
    pairs = CASES[write_steps][0]
    task = {"pairs": pairs, "queries": None}
    return 100 * evaluate(gradmem.load(checkpoint), [write_steps], samples, 0, "valid", task)[0].exact_match


def main() -> None:
    """Command line."""
    command = parser(__doc__, repeats=None)
    command.add_argument("--output", type=Path, default=Path("runs/precision"), metavar="DIR", help="of the runs")
    command.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each arm")
    command.add_argument("--samples", type=int, default=200, metavar="N", help="validation contexts")
    options = command.parse_args()
    torch.set_num_threads(options.threads)
    found: dict[tuple[int, str], list[float]] = {}
    for seed in range(options.seeds):
        for write_steps in CASES:
            for precision in PRECISIONS:
                checkpoint = trained(options.output, write_steps, precision, seed)
                value = measured(checkpoint, write_steps, options.samples)
                found.setdefault((write_steps, precision), []).append(value)
                print(f"K={write_steps} {precision} seed {seed}: {value:.2f} %", flush=True)
    rows: list[Row] = [
        {
            "write steps": write_steps,
            "pairs": CASES[write_steps][0],
            "precision": precision,
            "mean EM %": round(statistics.mean(values), 2),
            **{f"seed {seed}": round(value, 2) for seed, value in enumerate(values)},
        }
        for (write_steps, precision), values in found.items()
    ]
    report("kv-16 trained on in two precisions", rows, machine(options.threads, "fp32, bf16"), options.json)


if __name__ == "__main__":
    main()
