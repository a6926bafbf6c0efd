"""Does a pretrained model answer from its memory? A few real examples, to be learned by heart through WRITE and READ.

Trains the recipe babi-gpt2 with a small model on the first stories of an official bAbI file until it knows them, and
asks all their questions again, answers generated. What the weights know by themselves shows in the controls: unwritten
memories, and those of the next story.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

import gradmem
from benchmarks.common import Row, machine, parser, report
from gradmem.data.sources import find_file
from gradmem.model import MemoryModel
from gradmem.model.build import build_task
from gradmem.tasks.base import Task
from gradmem.training.recipe import Recipe, Stage, load_recipe
from gradmem.training.trainer import Trainer

STEPS = 2


def first_stories(data: Path, task: str, stories: int, place: Path) -> None:
    """Copy the first stories of a task's training file."""
    file = find_file(data, f"{task}_*_train.txt", task)
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    begins = [i for i, line in enumerate(lines) if line.startswith("1 ")]
    (place / file.name).write_text("".join(islice(lines, begins[stories])), encoding="utf-8")


def recipe(model: str, data: Path, task: str, steps: int) -> Recipe:
    """babi-gpt2 for a small model: larger steps of both kinds, float32, no reconstruction loss."""
    base = load_recipe("babi-gpt2")
    return replace(
        base,
        task={"name": "babi", "tasks": task, "tokenizer": model, "data": str(data)},
        backbone={"pretrained": model},
        method={**base.method, "write_steps": STEPS, "inner_lr": 0.5},
        precision="fp32",
        adamw_lr=1e-3,
        write_loss_weight=0.0,
        stages=[Stage(write_steps=[STEPS], max_steps=steps, decay_steps=steps // 2, batch_size=16, warmup_steps=50)],
        strategy="unroll",
        micro_batch_size=16,
        valid_samples=10,
    )


def generated(model: MemoryModel, task: Task, steps: int, shift: int) -> float:
    """Generated answers that are right, each asked of the memory `shift` stories on, as a fraction."""
    batch = task.batch("train", 0, task.size("train") or 0)
    wanted = [task.decode(row[row != -100].tolist()) for row in batch.labels]
    with torch.no_grad():
        memory = model.method.write(batch.context, steps).memory
    options = task.greedy_options()
    rows = (batch.rows + shift) % len(batch.context)
    found = model.method.generate(memory, batch.prompts(), rows, pad_id=task.pad_id, **options)
    return sum(task.decode(ids) == answer for ids, answer in zip(found, wanted, strict=True)) / len(wanted)


def main() -> None:
    """Command line."""
    command = parser(__doc__, repeats=None)
    command.add_argument("data", type=Path, help="directory with official bAbI files")
    command.add_argument("model", help="directory, hub name or GGUF file of a small pretrained model")
    command.add_argument("--task", default="qa1", help="task")
    command.add_argument(
        "--stories", type=int, default=15, metavar="N", help="stories, of which one in ten is left out"
    )
    command.add_argument("--steps", type=int, default=600, metavar="N", help="training steps")
    options = command.parse_args()
    torch.set_num_threads(options.threads)
    where = machine(options.threads, "fp32")
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        try:
            first_stories(options.data, options.task, options.stories, place)
            trainer = Trainer(recipe(options.model, place, options.task, options.steps), place / "run")
        except gradmem.GradmemError as error:
            command.error(str(error))
        model = trainer.run()
        model.method.eval()
        task = build_task(trainer.recipe.task)
        labels = task.batch("train", 0, task.size("train") or 0).labels
        common = Counter(task.decode(row[row != -100].tolist()) for row in labels).most_common(1)[0][1]
        kinds = {"written": (STEPS, 0), "control: unwritten": (0, 0), "control: swapped": (STEPS, 1)}
        rows: list[Row] = [
            {"memory": kind, "right_pct": 100 * generated(model, task, *asked), "examples": len(labels)}
            for kind, asked in kinds.items()
        ]
        rows.append({"memory": "the most common answer", "right_pct": 100 * common / len(labels)})
    report(f"{options.task}, learned by heart", rows, where, options.json)


if __name__ == "__main__":
    main()
