"""What gradient steps could write into a linear memory: a yardstick for eight vectors of 128.

Every character that may follow a key has a random code in D dimensions, and a memory scores it by their scalar
product. WRITE takes K gradient steps with momentum on the cross-entropy of the pairs, with rates, momentum and
temperatures meta-learned for this D, number of pairs and K. Nothing is a network here: this is what is left of GradMem
where the codes are as good as chance makes them and fill D of the memory's 1,024 dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Row, machine, measure, parser, report

CHARACTERS, PER_VALUE = 62, 2
META_STEPS, META_LR, BATCH = 40, 0.1, 2


@dataclass(frozen=True)
class Context:
    """Codes (batch, characters to recall, alphabet, D) and which characters are right."""

    codes: Tensor
    right: Tensor

    @classmethod
    def draw(cls, pairs: int, dims: int, batch: int) -> Context:
        """Draw codes of unit length on average."""
        shape = (batch, pairs * PER_VALUE, CHARACTERS, dims)
        return cls(torch.randn(shape) / dims**0.5, torch.randint(CHARACTERS, shape[:2]))

    def scores(self, memory: Tensor) -> Tensor:
        """Scores (batch, characters to recall, alphabet) of a memory (batch, D)."""
        return torch.einsum("bncd,bd->bnc", self.codes, memory)

    def gradient(self, memory: Tensor, temperature: Tensor) -> Tensor:
        """Gradient (batch, D) of the summed cross-entropy at that inverse temperature."""
        wrong = torch.softmax(self.scores(memory) * temperature, -1) - F.one_hot(self.right, CHARACTERS)
        return torch.einsum("bncd,bnc->bd", self.codes, wrong)

    def exact_match(self, memory: Tensor) -> float:
        """Share of the pairs with all characters right."""
        hits = self.scores(memory).argmax(-1) == self.right
        return float(hits.unflatten(1, (-1, PER_VALUE)).all(-1).float().mean())


class Writer(torch.nn.Module):
    """K gradient steps with learned rates, momentum and temperatures.

    Parameters
    ----------
    steps : int
        K.
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.log_rates = torch.nn.Parameter(torch.zeros(steps))
        self.momentum = torch.nn.Parameter(torch.full((steps,), 0.2))
        self.log_temperatures = torch.nn.Parameter(torch.full((steps + 1,), 1.5))

    def forward(self, context: Context) -> Tensor:
        """Memory (batch, D) after the steps."""
        memory = velocity = context.codes.new_zeros(len(context.codes), context.codes.shape[-1])
        temperatures = self.log_temperatures[:-1].exp()
        for rate, momentum, temperature in zip(self.log_rates.exp(), self.momentum, temperatures, strict=True):
            velocity = momentum * velocity - rate * context.gradient(memory, temperature)
            memory = memory + velocity
        return memory

    def loss(self, context: Context) -> Tensor:
        """What READ makes of it, at a temperature of its own."""
        scores = context.scores(self(context)) * self.log_temperatures[-1].exp()
        return F.cross_entropy(scores.flatten(0, 1), context.right.flatten())


def recall(dims: int, pairs: int, steps: int, samples: int) -> float:
    """Exact match of fresh contexts after meta-learning."""
    writer = Writer(steps)
    optimizer = torch.optim.Adam(writer.parameters(), META_LR)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, META_STEPS)
    for _ in range(META_STEPS):
        optimizer.zero_grad()
        writer.loss(Context.draw(pairs, dims, BATCH)).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        fresh = (Context.draw(pairs, dims, 1) for _ in range(samples))
        return sum(context.exact_match(writer(context)) for context in fresh) / samples


def keeps(dims: int, steps: int, pairs: Sequence[int], samples: int) -> Row:
    """What so many dimensions keep after so many steps."""
    found = {f"{count} pairs, EM %": 100 * recall(dims, count, steps, samples) for count in pairs}
    return {"dimensions": dims, "steps": steps, **found}


def main() -> None:
    """Command line."""
    command = parser(__doc__, repeats=None)
    command.add_argument("--dims", type=int, nargs="+", default=[640, 768, 844, 1024], metavar="D", help="dimensions")
    command.add_argument("--pairs", type=int, nargs="+", default=[16, 32, 64, 96, 128], metavar="N", help="pairs")
    command.add_argument("--steps", type=int, nargs="+", default=[1, 5], metavar="K", help="write steps")
    command.add_argument("--samples", type=int, default=20, help="fresh contexts")
    command.add_argument("--seed", type=int, default=0)
    options = command.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    title, where = "A linear memory of random codes", machine(options.threads, "fp32")
    cells = [(dims, steps) for dims in options.dims for steps in options.steps]
    rows = measure(title, [partial(keeps, *cell, options.pairs, options.samples) for cell in cells])
    report(title, rows, where, options.json)


if __name__ == "__main__":
    main()
