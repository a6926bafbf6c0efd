"""Which steps help a memory that starts as entries of the context's cache? Write objectives, and how many steps.

Validation paragraphs of the training files are written by `gradmem` on keys and values with `start: select`, a tenth of
the cache, and asked their questions after each number of steps: loss of the reference answers, and exact match of the
generated ones. The inner learning rate of each objective is searched on a few other validation paragraphs. With
`--train`, rates for each layer and head and momentum are then meta-learned on training paragraphs, and nothing else.
With `--start compact` the steps begin where the method `compact` ends.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import gradmem
from benchmarks.common import Row, autocast, machine, parser, report
from gradmem.batch import Batch
from gradmem.compaction.text import Text, read_text
from gradmem.memory import Memory
from gradmem.methods.base.started_gradmem import StartedGradMem
from gradmem.model import MemoryModel
from gradmem.model.build import build_method, build_task
from gradmem.tasks.base import Task

SCALES: dict[str, list[float]] = {
    "reconstruction": [0.3, 1.0, 3.0],
    "adam attention": [0.003, 0.01],
    "answers": [0.3, 1.0, 3.0],
    "adam reconstruction": [0.003, 0.01, 0.03],
    "reconstruction+answers": [0.3, 1.0, 3.0],
}
"""Inner learning rates that are searched for each case: objectives, after the inner optimizer if it is not sgd."""
STEPS = (1, 2, 5)
"""Numbers of write steps, besides none."""
BATCH = 4
"""Contexts of a training step."""


@dataclass
class Scores:
    """Sums over the questions of all contexts."""

    loss: float = 0.0
    tokens: int = 0
    right: float = 0.0
    asked: int = 0

    def add(self, model: MemoryModel, method: Any, memory: Memory, batch: Batch, generate: bool) -> None:
        """Ask all questions of one context."""
        with torch.no_grad():
            logits = method.read_targets(memory, batch).float()
            self.loss += float(F.cross_entropy(logits, batch.answers, reduction="sum"))
            self.tokens += len(batch.answers)
            if generate:
                options = model.task.greedy_options()
                found = method.generate(memory, batch.prompts(), batch.rows, pad_id=model.task.pad_id, **options)
                self.right += float(model.task.judge_generated(found, batch)["exact_match"].sum())
        self.asked += len(batch.rows)


def contexts(task: Task, first: int, count: int, longest: int) -> Iterator[Batch]:
    """Validation contexts of at most `longest` tokens, one by one, from the first on."""
    for number in range(task.size("valid") or 0):
        batch = task.batch("valid", number, 1, seed=1)
        if batch.context.ids.shape[1] <= longest:
            first, count = first - 1, count - (first <= 0)
            if first < 0:
                yield batch
            if not count:
                return


def started(model: MemoryModel, case: str, **options: Any) -> StartedGradMem:
    """The method on the checkpoint's backbone."""
    *optimizer, objectives = case.split()
    spec = {"name": "gradmem", "memory": "keys_values", "start": "select", "budget": 0.1, "shared": True}
    spec |= {"write_objective": objectives.replace("+", ","), "inner_optimizer": optimizer[0] if optimizer else "sgd"}
    spec |= {"freeze_backbone": True}
    made = build_method({**spec, "write_steps": max(STEPS), **options}, model.method.backbone).eval()
    assert isinstance(made, StartedGradMem)
    made.task = model.task
    return made


def reading_once(methods: Iterable[StartedGradMem]) -> None:
    """Let methods share what they read of the last text; nothing of the backbone is trained here.

    Those that start with `match` read it as `compact` does, with questions that fit any text.
    """
    last: dict[tuple[int, ...], Text] = {}

    def read(method: StartedGradMem, ids: list[int]) -> Text:
        compacted = method.options.start == "match"
        key = (compacted, "answers" in method.options.objectives, *ids)
        if key not in last:
            last.clear() if len(last) > 2 * BATCH else None
            if compacted:
                last[key] = read_text(method.backbone, method.task, ids)
            else:
                last[key] = StartedGradMem.read_text(method, ids)
        return last[key]

    for method in methods:
        method.read_text = partial(read, method)  # type: ignore[method-assign]


def at_rate(method: StartedGradMem, rate: float) -> StartedGradMem:
    """The same method with another inner learning rate."""
    method.options = replace(method.options, inner_lr=rate)
    return method


def measured(
    model: MemoryModel, method: StartedGradMem, batch: Batch, steps: Sequence[int], generate: bool
) -> dict[int, Scores]:
    """Scores of one context after each number of steps."""
    with torch.no_grad():
        states = list(method.at_steps(batch.context, steps))
    found = {number: Scores() for number, _ in states}
    for number, written in states:
        found[number].add(model, method, written.memory, batch, generate)
    return found


def starts(model: MemoryModel, batch: Batch, methods: Sequence[StartedGradMem]) -> dict[str, Scores]:
    """The whole cache, and the starts: with one budget for all heads, and with as many entries for each."""
    shared, alike = methods
    with torch.no_grad():
        text = shared.read_text(batch.context.ids[0].tolist())
        kept = {
            "whole cache": (shared, text.whole.memory()),
            "start, one budget": (shared, shared.start_of(text)[0].memory()),
            "start, heads alike": (alike, alike.start_of(text)[0].memory()),
        }
    found = {name: Scores() for name in kept}
    for name, (method, memory) in kept.items():
        found[name].add(model, method, memory, batch, generate=True)
    return found


def search(model: MemoryModel, methods: dict[str, StartedGradMem], batches: Sequence[Batch]) -> list[Row]:
    """Set each case's rate to that of the least loss after any number of steps; return all that was tried."""
    rows: list[Row] = []
    best: dict[str, tuple[float, float]] = {}
    for batch in batches:
        for case, method in methods.items():
            for rate in SCALES[case]:
                for steps, scores in measured(model, at_rate(method, rate), batch, STEPS, generate=False).items():
                    rows.append({"case": case, "rate": rate, "steps": steps, **_sums(scores)})
    totals: dict[tuple[str, float, int], list[float]] = {}
    for row in rows:
        total = totals.setdefault((row["case"], row["rate"], row["steps"]), [0.0, 0.0])
        total[0], total[1] = total[0] + row["loss"], total[1] + row["tokens"]
    for (case, rate, _), (loss, tokens) in totals.items():
        best[case] = min(best.get(case, (float("inf"), 0.0)), (loss / tokens, rate))
    for case, method in methods.items():
        at_rate(method, best[case][1])
    return [
        {"case": case, "rate": rate, "steps": steps, "loss": loss / tokens}
        for (case, rate, steps), (loss, tokens) in totals.items()
    ]


def _sums(scores: Scores) -> Row:
    return {"loss": scores.loss, "tokens": scores.tokens}


def trained(model: MemoryModel, task: Task, case: str, rate: float, steps: int, longest: int) -> StartedGradMem:
    """Meta-learn the inner learning rates and momentum on training contexts; the model stays as it is."""
    sgd = len(case.split()) == 1
    method = started(model, case, learn_inner_lr=True, learn_momentum=sgd, inner_lr=rate)
    optimizer = torch.optim.AdamW(method.inner_parameters(), lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    at, losses = 0, []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 * min(1.0, 2 * (1 - step / steps))
        loss = tokens = 0.0
        for _ in range(BATCH):
            batch = task.batch("train", at, 1)
            while batch.context.ids.shape[1] > longest:
                at += 1
                batch = task.batch("train", at, 1)
            at += 1
            memory = method.write(batch.context, (1, 2, 5)[step % 3]).memory
            own = F.cross_entropy(method.read_targets(memory, batch).float(), batch.answers, reduction="sum")
            own.backward()
            loss, tokens = loss + float(own.detach()), tokens + len(batch.answers)
        for parameter in method.inner_parameters():
            parameter.grad = None if parameter.grad is None else parameter.grad / tokens
        torch.nn.utils.clip_grad_norm_(method.inner_parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss / tokens)
        print(f"{case}: step {step + 1}, {losses[-1]:.3f} nats", flush=True)
    return method


def main() -> None:
    """Command line."""
    command = parser(__doc__, repeats=None)
    command.add_argument("data", type=Path, help="directory of the files that the checkpoint was trained on")
    command.add_argument("--checkpoint", default="english", help="name or directory")
    command.add_argument("--start", default="select", choices=("select", "compact"), help="where the steps begin")
    command.add_argument("--cases", default="reconstruction,adam attention", help=f"some of {', '.join(SCALES)}")
    command.add_argument("--contexts", type=int, default=24, metavar="N", help="validation contexts to measure on")
    command.add_argument("--search", type=int, default=6, metavar="N", help="further ones to search rates on")
    command.add_argument("--train", type=int, default=0, metavar="N", help="training steps of each case")
    command.add_argument("--longest", type=int, default=150, metavar="T", help="most tokens of a context")
    options = command.parse_args()
    if options.train and options.start != "select":
        command.error("--train goes with --start select alone")
    torch.set_num_threads(options.threads)
    where = machine(options.threads, "bf16")
    model = gradmem.load(options.checkpoint)
    task = build_task({**model.spec["task"], "data": str(options.data)})
    rows: list[Row] = []
    with autocast("bf16"), model.method.backbone.training_attention():
        tried = list(contexts(task, options.contexts, options.search, options.longest))
        fresh = list(contexts(task, 0, options.contexts, options.longest))
        start = "match" if options.start == "compact" else "select"
        methods = {case: started(model, case, start=start) for case in options.cases.split(",")}
        reading_once(methods.values())
        for row in search(model, methods, tried) if tried else []:
            print(json.dumps(row), flush=True)
        named = dict(methods)
        if options.train:
            for case, method in methods.items():
                rate = method.options.inner_lr
                named[f"{case}, meta-trained"] = trained(model, task, case, rate, options.train, options.longest)
        alike = started(model, "reconstruction", shared=False)
        reading_once([*named.values(), alike])
        found: dict[tuple[str, int], Scores] = {}
        for number, batch in enumerate(fresh, 1):
            of_starts = starts(model, batch, [next(iter(methods.values())), alike])
            mine = {(name, 0): scores for name, scores in of_starts.items()}
            for case, method in named.items():
                states = measured(model, method, batch, STEPS, generate=True)
                mine |= {(case, steps): scores for steps, scores in states.items()}
            for key, scores in mine.items():
                _join(found.setdefault(key, Scores()), scores)
            print(number, {" ".join(map(str, key)): _shown(scores) for key, scores in found.items()}, flush=True)
    for (case, steps), scores in found.items():
        own = {"rate": methods[case].options.inner_lr} if case in methods else {}
        rows.append({"memory": case, "steps": steps, **_shown(scores), **own})
    report(f"{len(fresh)} validation contexts of up to {options.longest} tokens, a tenth", rows, where, options.json)


def _join(total: Scores, more: Scores) -> None:
    total.loss, total.tokens = total.loss + more.loss, total.tokens + more.tokens
    total.right, total.asked = total.right + more.right, total.asked + more.asked


def _shown(scores: Scores) -> Row:
    return {
        "nats": round(scores.loss / scores.tokens, 3),
        "EM %": round(100 * scores.right / scores.asked, 1),
        "questions": scores.asked,
    }


if __name__ == "__main__":
    main()
