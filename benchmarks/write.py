"""Write throughput, and the share of the machine's matrix-product peak that it reaches.

The FLOPs of a write follow from its shapes, two for each multiply-add. With S context tokens, T = S + m - 1
positions, L layers of width d, W weights in the blocks' matrices and V output tokens, a context and write step take

    2 * (2 T W + 2 S d V) + 3 * 4 L T^2 d

A linear map costs one product forward and one backward (its weights get no gradient); each of the two products of
attention, which counts as the full square, costs two backward. The peak is the best rate of a large square product
before and after the writes.
"""

from __future__ import annotations

from functools import partial
from itertools import product

import torch

from benchmarks.common import (
    Precision,
    Row,
    autocast,
    machine,
    matmul_peak,
    measure,
    paper_model,
    parser,
    report,
)
from gradmem.experiments.cost import seconds
from gradmem.methods import Method
from gradmem.model import MemoryModel


def write_flops(method: Method, tokens: int, steps: int) -> float:
    """FLOPs to write one context of `tokens` tokens; the formula stands at the top of this file."""
    config = method.backbone.model.config
    layers, d, vocabulary = config.num_hidden_layers, config.hidden_size, config.vocab_size
    blocks = method.backbone.model.base_model.layers
    weights = sum(p.numel() for p in blocks.parameters() if p.dim() == 2)
    positions = tokens + method.n_mem - 1
    linear = 2 * positions * weights + 2 * tokens * d * vocabulary
    attention = 4 * layers * positions**2 * d
    return steps * (2 * linear + 3 * attention)


def job(model: MemoryModel, steps: int, batch: int, precision: Precision, repeats: int) -> Row:
    """Measure one size."""
    context = model.task.batch("test", 0, batch).context
    model.method.eval()

    def write() -> None:
        with torch.no_grad(), autocast(precision):
            model.method.write(context, steps)

    took = seconds(write, repeats)
    flops = batch * write_flops(model.method, context.ids.shape[1], steps)
    return {
        "pairs": len(model.task.examples(model.task.tokenizer.decode(context.ids[0].tolist()))),
        "tokens": context.ids.shape[1],
        "write_steps": steps,
        "batch": batch,
        "seconds_median": took,
        "contexts_per_s": batch / took,
        "tokens_per_s": context.ids.numel() / took,
        "gflop": flops / 1e9,
        "gflop_per_s": flops / took / 1e9,
    }


def main() -> None:
    """Command line."""
    command = parser(__doc__)
    command.add_argument("--pairs", type=int, nargs="+", default=[32, 96], metavar="N", help="pairs")
    command.add_argument("--steps", type=int, nargs="+", default=[1, 5], metavar="K", help="write steps")
    command.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64], metavar="B", help="contexts")
    command.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of matrix products")
    options = command.parse_args()
    torch.set_num_threads(options.threads)
    where = machine(options.threads, options.precision)
    peak = matmul_peak(options.precision)
    models = {pairs: paper_model(pairs) for pairs in options.pairs}
    jobs = [
        partial(job, models[pairs], steps, batch, options.precision, options.repeats)
        for pairs, steps, batch in product(options.pairs, options.steps, options.batch)
    ]
    rows = measure("writes", jobs)
    peak = max(peak, matmul_peak(options.precision))
    where["matmul_gflop_per_s"] = round(peak / 1e9, 1)
    for row in rows:
        row["share_of_peak"] = row["gflop_per_s"] / peak * 1e9
    report("WRITE, without gradients to the weights", rows, where, options.json)


if __name__ == "__main__":
    main()
