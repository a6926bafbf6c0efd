"""What write steps that know the curvature would keep: is the memory full, or the descent too short?

From states of a checkpoint's own descent, Gauss-Newton steps on the same write loss go on. Each solves
(H + damping) s = g by conjugate gradients, H being J' (diag p - p p') J over all tokens of a context, and takes a part
of s. A product with H costs as much as another gradient, so this is no writer to use: it tells what a step could do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

import gradmem
from common import Row, machine, measure, parser, report
from gradmem.batch import Batch, Tokens
from gradmem.memory import Memory
from gradmem.methods import GradMem
from gradmem.model import MemoryModel
from gradmem.specs import build_task
from gradmem.tasks.base import Task

PAIR, TOGETHER = 7, 8
"""Tokens of a pair, and pairs that are read at a time, as `kv-96` does."""


def logits_of(method: GradMem, memory: Tensor, context: Tokens) -> tuple[Tensor, Tensor]:
    """Logits (tokens, vocabulary) of the pairs of a context (1, length) under a memory (m, d), and their tokens."""
    chunks = context.ids[0, :-1].view(-1, PAIR * TOGETHER)
    embeds = torch.cat([memory.expand(len(chunks), -1, -1), method.backbone.embed(chunks[:, :-1])], 1)
    head = method.backbone.head if method.write_head is None else method.write_head
    return head(method.backbone.hidden(embeds)[:, len(memory) - 1 :]).flatten(0, 1), chunks.flatten()


def gauss_newton(method: GradMem, memory: Tensor, context: Tokens, damping: float, iterations: int) -> Tensor:
    """The step (m, d) that solves the damped equations, after so many conjugate gradients."""
    with method.backbone.second_order():
        point = memory.clone().requires_grad_()
        logits, ids = logits_of(method, point, context)
        chances = logits.detach().softmax(-1)
        # J'u is linear in u and has J as its derivative: a forward product without forward-mode formulas.
        dual = torch.zeros_like(logits, requires_grad=True)
        (pulled,) = torch.autograd.grad(logits, point, dual, create_graph=True)

        def product(vector: Tensor) -> Tensor:
            (pushed,) = torch.autograd.grad(pulled, dual, vector, retain_graph=True)
            spread = chances * (pushed - (chances * pushed).sum(-1, keepdim=True))
            (back,) = torch.autograd.grad(logits, point, spread, retain_graph=True)
            return back + damping * vector

        wrong = chances - F.one_hot(ids, chances.shape[-1])
        (gradient,) = torch.autograd.grad(logits, point, wrong, retain_graph=True)
        return conjugate_gradients(product, gradient, iterations)


def conjugate_gradients(product: Callable[[Tensor], Tensor], target: Tensor, iterations: int) -> Tensor:
    """Solve product(x) = target, starting from zero, for a positive definite product."""
    found, rest, direction = torch.zeros_like(target), target, target
    for _ in range(iterations):
        image, size = product(direction), rest.square().sum()
        rate = size / (direction * image).sum()
        found, rest = found + rate * direction, rest - rate * image
        direction = rest + rest.square().sum() / size * direction
    return found


@dataclass
class Contexts:
    """Single contexts, and the memories (m, d) before the first of a checkpoint's own steps and after every one."""

    model: MemoryModel
    task: Task
    batches: list[Batch]
    states: list[list[Tensor]]

    @classmethod
    def write(cls, model: MemoryModel, task: Task, batches: list[Batch], steps: int) -> Contexts:
        """Take that many of its own steps."""
        walks = [model.method.trajectory(batch.context, steps) for batch in batches]
        return cls(model, task, batches, [[written.memory.tensors["memory"][0] for written in walk] for walk in walks])

    def recalled(self, memories: list[Tensor]) -> float:
        """Exact match over all queries, in percent."""
        hits = []
        for memory, batch in zip(memories, self.batches, strict=True):
            given = Memory({"memory": memory[None]})
            logits = self.model.method.read_targets(given, batch.queries, batch.labels, batch.rows)
            hits.append(self.task.judge(logits, batch)["exact_match"].float().mean())
        return 100 * float(torch.stack(hits).mean())

    def keep(self, own: int, curved: int, damping: float, iterations: int, part: float) -> Row:
        """What is kept after some of the checkpoint's own steps and some that know the curvature."""
        method = cast(GradMem, self.model.method)
        memories = [states[own] for states in self.states]
        for _ in range(curved):
            memories = [
                memory - part * gauss_newton(method, memory, batch.context, damping, iterations)
                for memory, batch in zip(memories, self.batches, strict=True)
            ]
        return {
            "own_steps": own,
            "gauss_newton_steps": curved,
            "EM, %": self.recalled(memories),
            "swapped, %": self.recalled(memories[1:] + memories[:1]),
        }


def main() -> None:
    """Command line."""
    command = parser(__doc__, repeats=None)
    command.add_argument("--checkpoint", default="kv-96", help="GradMem on key-value pairs")
    command.add_argument("--pairs", type=int, default=96, metavar="N", help="pairs, a multiple of eight")
    command.add_argument("--samples", type=int, default=16, help="fresh contexts")
    command.add_argument("--seed", type=int, default=1, help="their seed")
    command.add_argument("--split", choices=["valid", "test"], default="test")
    command.add_argument("--damping", type=float, default=30, help="added to H, in nats of all tokens")
    command.add_argument("--iterations", type=int, default=30, help="conjugate gradients of a step")
    command.add_argument("--part", type=float, default=0.7, help="of the solution that a step goes")
    options = command.parse_args()
    torch.set_num_threads(options.threads)
    if options.pairs % TOGETHER:
        command.error(f"--pairs must be a multiple of {TOGETHER}")
    try:
        model = gradmem.load(options.checkpoint)
        task = build_task({**model.spec["task"], "pairs": options.pairs})
    except gradmem.GradmemError as error:
        command.error(str(error))
    where = machine(options.threads, "fp32")
    model.method.requires_grad_(False)
    trained = model.method.write_steps
    batches = [task.batch(options.split, i, 1, options.seed) for i in range(options.samples)]
    contexts = Contexts.write(model, task, batches, 2 * trained)
    solver = options.damping, options.iterations, options.part
    cells = [(0, 0), *((own, trained - own) for own in range(1, trained + 1)), (trained + 1, 0), (2 * trained, 0)]
    title = f"{options.checkpoint}, {options.pairs} pairs, {options.samples} {options.split} contexts"
    rows = measure(title, [partial(contexts.keep, *cell, *solver) for cell in cells])
    report(title, rows, where, options.json)


if __name__ == "__main__":
    main()
