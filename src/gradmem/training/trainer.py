"""The meta-training loop, on Accelerate."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast_object_list, set_seed
from torch import Tensor

from ..batch import Batch
from ..device import device_named
from ..errors import GradmemError
from ..evaluation.measurement import evaluate
from ..files import write_bytes
from ..interruption import Interruptible
from ..model import MemoryModel
from ..model.build import build_task
from ..model.loading import load
from ..tasks.base import Task
from .optimizers import build_optimizers
from .plan import gigabytes, plan_stage, stage_precision
from .precision import matmul_precision
from .recipe import Recipe, Stage
from .state import Place, load_state, replace, save_state, states, take_weights
from .step import MetaStep, outer_loss

if TYPE_CHECKING:
    from .progress import Report

WINDOW = 10
"""Steps over which exact match is averaged."""
SHOWN = 3
"""Names of weights that a line shows."""
FIELDS = [
    "step",
    "stage",
    "loss",
    "write_loss",
    "exact_match",
    "write_steps",
    "lr_scale",
    "grad_norm",
    "samples",
    "seconds",
]


class Draw(NamedTuple):
    """What an optimiser step trains on: write steps, task, and the parts of the batch, on the training device."""

    steps: int
    task: Task
    parts: list[Batch]
    contexts: int
    queries: int
    tokens: int
    """Target tokens."""


clock = time.perf_counter
"""Seconds on the wall. A step has read its numbers from the device by then, and nothing else is waited for."""


class Trainer:
    """Train a recipe.

    Parameters
    ----------
    recipe : Recipe
    output : Path
        Directory of the run: recipe, log, resumable states and the checkpoint.
    resume : {"auto", "never"}
        Continue from the newest state where there is one, or start anew.
    report : Report, optional
        Where progress is shown; by default a bar or lines on standard error.
    """

    def __init__(
        self,
        recipe: Recipe,
        output: Path,
        resume: Literal["auto", "never"] = "auto",
        report: Report | None = None,
    ) -> None:
        device = device_named(recipe.device)
        kind = device.type
        if device != torch.device(kind):
            raise GradmemError(f"each process of a run takes a device of its own: say `device: {kind}`, not {device}")
        self.recipe, self.output, self.report = recipe, output, report
        self.accelerator = Accelerator(
            cpu=kind == "cpu",
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        set_seed(recipe.seed)
        self.model = MemoryModel.from_spec(recipe.task, recipe.backbone, recipe.method)
        self.fresh: list[str] = []
        if recipe.init_from:
            try:
                start = load(recipe.init_from)
            except GradmemError as error:
                raise GradmemError(
                    f"cannot start from `init_from: {recipe.init_from}`: {error}; "
                    "train that first, or say --init_from WHERE"
                ) from error
            self.fresh = take_weights(self.model.method, start.method)
            if len(self.fresh) == len(self.model.method.state_dict()):
                raise GradmemError(
                    f"cannot start from `init_from: {recipe.init_from}`: none of its weights has the name and shape of "
                    f"one of this recipe, as {self.fresh[0]}"
                )
        self.model.name = str(output / "checkpoint")
        self.model.to(self.accelerator.device)
        self.optimizers = build_optimizers(self.model.method, recipe)
        if not self.optimizers:
            raise GradmemError("this recipe leaves nothing to train")
        self.base_lrs = [[group["lr"] for group in o.param_groups] for o in self.optimizers]
        self.place = Place()
        saved = states(output / "states")
        if resume == "auto" and saved:
            self.place = Place.of(saved[-1], load_state(saved[-1], self.model.method, self.optimizers))
        elif saved:
            raise GradmemError(f"{output} holds a run: resume it with --resume auto, or give another --output")
        self.meta_step = MetaStep(self.model.method)
        self.step_module = self.accelerator.prepare(self.meta_step)
        self.parameters = [p for p in self.model.method.parameters() if p.requires_grad]
        self.coming: tuple[tuple[int, int], Draw] | None = None
        self.stopped = Interruptible()
        self.stop = False

    def run(self) -> MemoryModel:
        """Train to the end of the last stage and return the model; its checkpoint is in `output/checkpoint`.

        Raises
        ------
        GradmemError
            When loss or gradient are not finite; the newest state and checkpoint stay as they are.
        KeyboardInterrupt
            After Ctrl-C or SIGTERM, when the state after the step at hand is saved.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        if self.main:
            (self.output / "recipe.yaml").write_text(yaml.safe_dump(dataclasses.asdict(self.recipe), sort_keys=False))
        with self._log() as log, self._progress() as progress, self.stopped:
            while self.place.stage < len(self.recipe.stages) and not self._time_is_over():
                self._run_stage(self.recipe.stages[self.place.stage], log, progress)
        return self.model

    @property
    def main(self) -> bool:
        """Whether this process writes files and speaks."""
        return bool(self.accelerator.is_main_process)

    def _run_stage(self, stage: Stage, log: Any, progress: Report) -> None:
        place, specs = self.place, [{**self.recipe.task, **options} for options in stage.tasks]
        tasks = [build_task(spec) for spec in specs]
        progress.begin(self.place.stage, stage)
        notes = [*self._untaken(), *(note for task in tasks for note in task.notes("train"))]
        for note in dict.fromkeys(notes):
            progress.say(note)
        self._choose_precision(stage, tasks, progress)
        with matmul_precision(place.precision, self.accelerator.device):
            self._train_stage(stage, tasks, specs, log, progress)

    def _train_stage(
        self, stage: Stage, tasks: list[Task], specs: list[dict[str, Any]], log: Any, progress: Report
    ) -> None:
        place = self.place
        self._plan(stage, tasks, progress)
        while not (finished := self._finished(stage)) and not self._time_is_over() and not self.stop:
            started = clock()
            try:
                row = self._step(stage, tasks)
            except (MemoryError, RuntimeError) as error:
                raise self._explained(error, stage, tasks) from error
            self._count(started)
            row |= {
                "step": place.step,
                "stage": place.stage,
                "samples": place.samples,
                "seconds": place.seconds,
            }
            log(row)
            progress.show(row, place)
            if place.step % self.recipe.save_every == 0:
                self._save()
        if self.stop and not finished:
            self._save()
            raise KeyboardInterrupt
        progress.end(place)
        # The checkpoint first: a run that is killed between the two repeats some steps and saves it again.
        if self.main:
            self.model.task, self.model.spec["task"] = tasks[0], specs[0]
            temporary = self.output / "checkpoint.tmp"
            shutil.rmtree(temporary, ignore_errors=True)
            self.model.save_pretrained(temporary)
            replace(temporary, self.output / "checkpoint")
            self._validate(stage, progress)
        if finished:
            place.next_stage()
        self._save()

    def _untaken(self) -> list[str]:
        """What a warm start did not find where it began, said once."""
        if self.place.step or not self.fresh:
            return []
        more = f" and {len(self.fresh) - SHOWN} more" if len(self.fresh) > SHOWN else ""
        return [f"not in {self.recipe.init_from}, so new: {', '.join(self.fresh[:SHOWN])}{more}"]

    def _choose_precision(self, stage: Stage, tasks: list[Task], progress: Report) -> None:
        """Settle the stage's precision; a resumed run keeps to it on the same kind of device."""
        place, device = self.place, self.accelerator.device
        if place.device != device.type:
            place.device, place.precision, place.micro_batch_size = device.type, "auto", 0
        if self.recipe.precision != "auto":
            place.precision = self.recipe.precision
        elif place.precision == "auto":
            started = clock()
            found = stage_precision(self.recipe, stage, self.model.method, tasks, device)
            place.precision, reason = broadcast_object_list(list(found))
            self._count(started)
            progress.say(f"precision {place.precision}: {reason}")
        self.meta_step.precision = place.precision

    def _plan(self, stage: Stage, tasks: list[Task], progress: Report) -> None:
        """Settle how the stage's steps run; a resumed run keeps to it, to go on with the same numbers."""
        recipe, place, accelerator = self.recipe, self.place, self.accelerator
        if recipe.strategy == "compile":
            progress.say("compiling the write steps, which takes a minute or two for every length of context")
        kept = recipe.strategy in ("auto", place.strategy) and recipe.micro_batch_size in (0, place.micro_batch_size)
        if recipe.strategy != "auto" and recipe.micro_batch_size:
            place.strategy, place.micro_batch_size = recipe.strategy, recipe.micro_batch_size
        elif not (kept and place.micro_batch_size):
            started = clock()
            plan = plan_stage(
                recipe,
                stage,
                self.model.method,
                tasks,
                accelerator.device,
                place.precision,
                accelerator.num_processes,
            )
            # One process decides for all, which must agree on the number of parts.
            found = broadcast_object_list([plan.chosen.strategy, plan.chosen.micro_batch_size])
            place.strategy, place.micro_batch_size = found
            self._count(started)
            progress.say(f"{place.strategy}, {place.micro_batch_size} contexts at a time")
        self.model.method.strategy = place.strategy

    def _explained(self, error: Exception, stage: Stage, tasks: list[Task]) -> Exception:
        """For want of memory: which setting would fit. Any other error stays what it is."""
        # A CPU's allocator has no error class of its own.
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "you tried to allocate" not in str(error):
            return error
        error.__traceback__ = None  # holds on to the tensors of the failed step
        place, free = self.place, dataclasses.replace(self.recipe, strategy="auto", micro_batch_size=0)
        self.model.method.zero_grad()
        device, processes = self.accelerator.device, self.accelerator.num_processes
        plan = plan_stage(free, stage, self.model.method, tasks, device, place.precision, processes)
        fits = plan.chosen
        return GradmemError(
            f"out of memory at step {place.step} with `strategy: {place.strategy}` and `micro_batch_size: "
            f"{place.micro_batch_size}`; `strategy: {fits.strategy}` and `micro_batch_size: {fits.micro_batch_size}` "
            f"take {gigabytes(fits.bytes)} of {gigabytes(plan.budget)}: put these into the recipe and start again; "
            f"the last good state is kept in {self.output / 'states'}"
        )

    def _validate(self, stage: Stage, progress: Report) -> None:
        """Measure the stage's model on contexts that training never sees, with control rows."""
        self.model.method.eval()
        steps = sorted(set(stage.write_steps))
        results = evaluate(self.model, steps, self.recipe.valid_samples, self.recipe.seed, split="valid")
        self.model.method.train()
        rows = json.dumps([result.to_dict() for result in results], indent=1)
        write_bytes(self.output / f"valid-{self.place.stage + 1}.json", rows.encode())
        shown = ", ".join(f"{r.exact_match:.2%} after {r.steps} steps" for r in results)
        last = results[-1]
        progress.say(f"validation EM {shown}; unwritten {last.unwritten:.2%}, swapped {last.swapped:.2%}")

    def _count(self, started: float) -> None:
        """Add the time since `started`, by one process's clock for all: rates and the end of a run depend on it."""
        seconds = self.place.seconds + clock() - started
        self.place.seconds = broadcast_object_list([seconds])[0]

    def _time_is_over(self) -> bool:
        """Whether the run has had its minutes."""
        return self.recipe.max_minutes is not None and self.place.seconds >= 60 * self.recipe.max_minutes

    def _finished(self, stage: Stage) -> bool:
        """Whether the stage is over; also starts its decay."""
        place = self.place
        mean = sum(place.recent) / WINDOW if len(place.recent) == WINDOW else 0.0
        reached = stage.until_exact_match is not None and mean >= stage.until_exact_match
        if place.decay_from is None and (reached or place.stage_step >= stage.max_steps - stage.decay_steps):
            place.decay_from = place.stage_step
        return place.decay_from is not None and place.stage_step >= place.decay_from + stage.decay_steps

    def _lr(self, stage: Stage) -> float:
        """Factor on the learning rates at this step."""
        place = self.place
        factor = stage.lr_scale * min(1.0, (place.stage_step + 1) / max(stage.warmup_steps, 1))
        if place.decay_from is not None:
            factor *= 1 - (place.stage_step - place.decay_from) / stage.decay_steps
        if self.recipe.max_minutes is not None:
            left = 1 - place.seconds / (60 * self.recipe.max_minutes)
            factor *= min(1.0, max(left, 0.0) / self.recipe.cooldown)
        return factor

    def _step(self, stage: Stage, tasks: list[Task]) -> dict[str, Any]:
        place, recipe = self.place, self.recipe
        ready, self.coming = self.coming, None
        now = place.stage, place.step
        draw = ready[1] if ready and ready[0] == now else self._draw(stage, tasks, place.step, place.samples)
        shown = self._backward(draw, self.recipe.weight_of(stage))
        norm = self.accelerator.clip_grad_norm_(self.parameters, recipe.clip_norm)
        factor = self._lr(stage)
        # A process that was told to stop stops all: each would wait for the others.
        told = torch.tensor([float(bool(self.stopped))]).to(shown, non_blocking=True)
        if self.accelerator.device.type != "cpu":  # which has much to do before it can say how it went
            coming = self._draw(stage, tasks, place.step + 1, place.samples + stage.batch_size)
            self.coming = (place.stage, place.step + 1), coming
        means = self.accelerator.reduce(torch.cat([shown, told]), "mean")
        numbers = torch.cat([means, norm.detach().to(shown)[None]])
        mean_loss, mean_write_loss, match, stop, grad_norm = numbers.tolist()
        self.stop = stop > 0
        if not (math.isfinite(grad_norm) and math.isfinite(mean_loss)):
            raise GradmemError(
                f"training diverged at step {place.step} (loss {mean_loss}, gradient norm {grad_norm}); the last "
                f"good state is kept in {self.output / 'states'}: lower the learning rates and resume"
            )
        for optimizer, base in zip(self.optimizers, self.base_lrs, strict=True):
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr * factor
            optimizer.step()
            optimizer.zero_grad()
        place.step, place.stage_step = place.step + 1, place.stage_step + 1
        place.samples += stage.batch_size
        place.recent = [*place.recent, match][-WINDOW:]
        return {
            "loss": mean_loss,
            "write_loss": mean_write_loss,
            "exact_match": match,
            "write_steps": draw.steps,
            "lr_scale": factor,
            "grad_norm": grad_norm,
        }

    def _draw(self, stage: Stage, tasks: list[Task], step: int, samples: int) -> Draw:
        """What an optimiser step trains on: a function of its number, so that resumed runs see the same."""
        accelerator = self.accelerator
        if stage.batch_size % accelerator.num_processes:
            raise GradmemError(
                f"batch_size {stage.batch_size} is not a multiple of {accelerator.num_processes} processes"
            )
        share = stage.batch_size // accelerator.num_processes
        numbers = random.Random(f"{self.recipe.seed} {step}")
        steps, task = numbers.choice(stage.write_steps), numbers.choice(tasks)
        batch = task.batch("train", samples + share * accelerator.process_index, share, self.recipe.seed)
        parts = [part.to(accelerator.device) for part in batch.split(self.place.micro_batch_size)]
        return Draw(steps, task, parts, len(batch.context), len(batch.rows), len(batch.targets))

    def _backward(self, draw: Draw, weight: float) -> Tensor:
        """Add up the gradients of the parts of a batch; return its loss, write loss and exact match."""
        accelerator, parts = self.accelerator, draw.parts
        # The mean over the target tokens of all processes, whose gradients are averaged.
        tokens = torch.tensor(float(draw.tokens)).to(accelerator.device, non_blocking=True)
        tokens = accelerator.reduce(tokens, "sum") / accelerator.num_processes
        shown = torch.zeros(3, device=accelerator.device)
        for part in parts:
            with contextlib.nullcontext() if part is parts[-1] else accelerator.no_sync(self.step_module):
                scored = draw.task.scored(part.labels)
                loss, write_loss, correct = self.step_module(part, draw.steps, scored, weight > 0)
                loss, write_loss = loss / tokens, write_loss * len(part.context) / draw.contexts
                accelerator.backward(outer_loss(loss, write_loss, weight))
            shown += torch.stack([loss.detach(), write_loss.detach(), correct.sum() / draw.queries])
        return shown

    def _save(self) -> None:
        if self.main:
            save_state(
                self.output / "states",
                self.place.step,
                self.model.method,
                self.optimizers,
                dataclasses.asdict(self.place),
            )
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _log(self) -> Iterator[Any]:
        """Open `log.csv` and TensorBoard; rows after the resumed step are dropped first."""
        if not self.main:
            yield lambda row: None
            return
        from torch.utils.tensorboard import SummaryWriter

        path = self.output / "log.csv"
        kept = []
        if path.exists() and self.place.step:
            with path.open(newline="") as file:
                kept = [row for row in csv.DictReader(file) if int(row["step"]) <= self.place.step]
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(kept)
            file.flush()
            board = SummaryWriter(str(self.output / "tensorboard"), purge_step=self.place.step)

            def log(row: dict[str, Any]) -> None:
                writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
                file.flush()
                for name in ("loss", "write_loss", "exact_match", "lr_scale", "grad_norm"):
                    board.add_scalar(name, row[name], row["step"])

            try:
                yield log
            finally:
                board.close()

    @contextmanager
    def _progress(self) -> Iterator[Report]:
        if self.report is not None:
            yield self.report
            return
        from ..cli.console import Console
        from .progress import Report

        with Report(Console(stderr=True, quiet=not self.main), len(self.recipe.stages)) as report:
            yield report
