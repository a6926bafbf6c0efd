"""The meta-training loop, on Accelerate."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml
from accelerate.utils import broadcast_object_list, set_seed
from torch import Tensor

from ..batch import Batch
from ..device import device_named
from ..errors import GradmemError
from ..evaluation.measurement import evaluate
from ..evaluation.result import Result
from ..files import atomic_directory, write_bytes
from ..interruption import Interruptible
from ..model import MemoryModel
from ..model.build import build_task
from ..model.loading import load
from ..tasks.base import Task
from .optimizers import build_optimizers
from .plan import Plan, gigabytes, plan_stage, stage_precision
from .precision import matmul_precision
from .progress import Report
from .recipe import Recipe, Stage
from .run_log import RunLog
from .schedule import WINDOW, finished, lr_scale, time_is_over, validation_is_due
from .sharding import gather, new_accelerator, on_device, prepare, trained_copy, whole
from .state import RunState, load_state, save_state, states, take_weights
from .step import MetaStep, outer_loss

SHOWN = 3
"""Names of weights that a note shows."""


class Draw(NamedTuple):
    """What an optimizer step trains on."""

    steps: int
    """Write steps K."""
    task: Task
    parts: list[Batch]
    """The micro-batches, on the training device."""
    contexts: int
    """Contexts in all parts."""
    queries: int
    """Queries in all parts."""
    tokens: int
    """Target tokens in all parts."""


clock = time.perf_counter
"""Wall-clock seconds. It is read after a step has read its numbers from the device, so it includes the whole step."""


class Trainer:
    """Train a recipe.

    Parameters
    ----------
    recipe : Recipe
    output : Path
        Directory of the run: recipe, log, resumable states and the checkpoint.
    resume : {"auto", "never"}
        Continue from the newest state in `output` if there is one, or refuse to.
    report : Report, optional
        Receives the progress; by default nobody does. Only the main process reports.

    Raises
    ------
    GradmemError
        If the recipe cannot be trained here, or `output` holds a run that cannot be resumed.
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
            raise GradmemError(
                f"training chooses a device for each process: give `device: {kind}`, without a number, not {device}"
            )
        self.recipe, self.output = recipe, output
        self.accelerator = new_accelerator(cpu=kind == "cpu")
        self.report = report if report is not None and self.main else Report()
        set_seed(recipe.seed)
        self.model = MemoryModel.from_spec(recipe.task, recipe.backbone, recipe.method)
        self.new_weights = self._start_from(recipe.init_from) if recipe.init_from else []
        self.model.name = str(output / "checkpoint")
        self.model.to(self.accelerator.device)
        trained = trained_copy(self.accelerator, self.model.method)
        self.optimizers = build_optimizers(trained, recipe)
        if not self.optimizers:
            raise GradmemError("this recipe freezes all weights: there is nothing to train")
        self.base_lrs = [[group["lr"] for group in o.param_groups] for o in self.optimizers]
        self.state = RunState()
        saved = states(output / "states")
        if resume == "auto" and saved:
            self.state = RunState.of(saved[-1], load_state(saved[-1], trained, self.optimizers))
        elif saved:
            raise GradmemError(f"{output} holds a run: resume it with --resume auto, or give another --output")
        self.meta_step = MetaStep(trained)
        self.step_module, self.optimizers = prepare(self.accelerator, self.meta_step, self.optimizers)
        self.parameters = [p for p in trained.parameters() if p.requires_grad]
        gather(trained, self.model.method)
        self.coming: tuple[tuple[int, int], Draw] | None = None
        self.stopped = Interruptible()
        self.stop = False

    def run(self) -> MemoryModel:
        """Train to the end of the last stage and return the model; its checkpoint is in `output/checkpoint`.

        Raises
        ------
        GradmemError
            If loss or gradient are not finite; the newest state and checkpoint are kept.
        KeyboardInterrupt
            After Ctrl-C or SIGTERM, when the current step is done and its state is saved.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        if self.main:
            (self.output / "recipe.yaml").write_text(yaml.safe_dump(dataclasses.asdict(self.recipe), sort_keys=False))
        with self._log() as log, self.report, self.stopped:
            while self._something_to_do():
                self._run_stage(self.recipe.stages[self.state.stage], log)
        return self.model

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and reports."""
        return bool(self.accelerator.is_main_process)

    def _something_to_do(self) -> bool:
        """Whether a stage is left. One that was stopped, and has no time left, still has its checkpoint to save."""
        state = self.state
        over = time_is_over(self.recipe, state) and state.ended == state.step
        return state.stage < len(self.recipe.stages) and not over

    def _start_from(self, name: str) -> list[str]:
        """Take over the weights of a checkpoint; return the names of those that it does not have."""
        try:
            start = load(name)
        except GradmemError as error:
            raise GradmemError(
                f"cannot start from `init_from: {name}`: {error}; train that first, or give another --init_from"
            ) from error
        new = take_weights(self.model.method, start.method)
        if len(new) == len(self.model.method.state_dict()):
            raise GradmemError(
                f"cannot start from `init_from: {name}`: none of its weights has the name and shape of a weight of "
                f"this recipe, such as {new[0]}"
            )
        return new

    def _run_stage(self, stage: Stage, log: RunLog | None) -> None:
        state, specs = self.state, [{**self.recipe.task, **options} for options in stage.tasks]
        tasks = [build_task(spec) for spec in specs]
        self.report.begin(state.stage, stage)
        notes = [*self._new_weights_note(), *(note for task in tasks for note in task.notes("train"))]
        for note in dict.fromkeys(notes):
            self.report.say(note)
        self._choose_precision(stage, tasks)
        with matmul_precision(state.precision, self.accelerator.device):
            self._train_stage(stage, tasks, specs, log)

    def _train_stage(self, stage: Stage, tasks: list[Task], specs: list[dict[str, Any]], log: RunLog | None) -> None:
        state = self.state
        self._plan(stage, tasks)
        while not (done := finished(stage, state)) and not time_is_over(self.recipe, state) and not self.stop:
            started, before = clock(), state.seconds
            try:
                row = self._step(stage, tasks)
            except (MemoryError, RuntimeError) as error:
                raise self._explain_out_of_memory(error, stage, tasks) from error
            self._add_elapsed(started)
            row |= {
                "step": state.step,
                "stage": state.stage,
                "samples": state.samples,
                "seconds": state.seconds,
            }
            if log is not None:
                log.step(row)
            self.report.show(row, state)
            if state.step % self.recipe.save_every == 0:
                self._save()
            due = validation_is_due(self.recipe, before, state.seconds)
            if due and not (finished(stage, state) or time_is_over(self.recipe, state)):
                gather(self.meta_step.method, self.model.method)
                self._validate(stage, tasks[0], specs[0], log)
        if self.stop and not done:
            self._save()
            raise KeyboardInterrupt
        self.report.end(state)
        gather(self.meta_step.method, self.model.method)
        # The checkpoint first: a run that is killed between the two repeats some steps and saves it again.
        if self.main:
            self.model.task, self.model.spec["task"] = tasks[0], specs[0]
            with atomic_directory(self.output / "checkpoint") as directory:
                self.model.save_pretrained(directory)
        results = self._validate(stage, tasks[0], specs[0], log)
        rows = json.dumps([result.to_dict() for result in results], indent=1)
        if self.main:
            write_bytes(self.output / f"valid-{state.stage + 1}.json", rows.encode())
        state.ended = state.step
        if done:
            state.next_stage()
        self._save()

    def _new_weights_note(self) -> list[str]:
        """A note on the weights that the checkpoint of `init_from` does not have, in the first stage only."""
        new = self.new_weights
        if self.state.step or not new:
            return []
        more = f" and {len(new) - SHOWN} more" if len(new) > SHOWN else ""
        return [f"not in {self.recipe.init_from}, so new: {', '.join(new[:SHOWN])}{more}"]

    def _choose_precision(self, stage: Stage, tasks: list[Task]) -> None:
        """Choose the precision of the stage; a run resumed on the same kind of device keeps it."""
        state, device = self.state, self.accelerator.device
        if state.device != device.type:
            state.device, state.precision, state.micro_batch_size = device.type, "auto", 0
        if self.recipe.precision != "auto":
            state.precision = self.recipe.precision
        elif state.precision == "auto":
            started = clock()
            with on_device(self.accelerator, self.model.method):
                found = stage_precision(self.recipe, stage, self.model.method, tasks, device)
            state.precision, reason = broadcast_object_list(list(found))
            self._add_elapsed(started)
            self.report.say(f"precision {state.precision}: {reason}")
        self.meta_step.precision = state.precision

    def _plan(self, stage: Stage, tasks: list[Task]) -> None:
        """Choose strategy and micro-batch size of the stage; a resumed run keeps them, to get the same numbers."""
        recipe, state = self.recipe, self.state
        if recipe.strategy == "compile":
            self.report.say("compiling the write steps, which takes a minute or two for every length of context")
        kept = recipe.strategy in ("auto", state.strategy) and recipe.micro_batch_size in (0, state.micro_batch_size)
        if recipe.strategy != "auto" and recipe.micro_batch_size:
            state.strategy, state.micro_batch_size = recipe.strategy, recipe.micro_batch_size
        elif not (kept and state.micro_batch_size):
            started = clock()
            plan = self._measured_plan(recipe, stage, tasks)
            # One process decides for all, which must agree on the number of parts.
            found = broadcast_object_list([plan.chosen.strategy, plan.chosen.micro_batch_size])
            state.strategy, state.micro_batch_size = found
            self._add_elapsed(started)
            self.report.say(f"{state.strategy}, {state.micro_batch_size} contexts at a time")
        self.meta_step.method.strategy = state.strategy

    def _measured_plan(self, recipe: Recipe, stage: Stage, tasks: list[Task]) -> Plan:
        method, accelerator = self.model.method, self.accelerator
        with on_device(accelerator, method):
            processes = accelerator.num_processes
            return plan_stage(recipe, stage, method, tasks, accelerator.device, self.state.precision, processes)

    def _explain_out_of_memory(self, error: Exception, stage: Stage, tasks: list[Task]) -> Exception:
        """Say which settings fit if memory ran out; return any other error unchanged."""
        # A CPU's allocator has no error class of its own.
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "you tried to allocate" not in str(error):
            return error
        error.__traceback__ = None  # it keeps the tensors of the failed step alive
        state, free = self.state, dataclasses.replace(self.recipe, strategy="auto", micro_batch_size=0)
        self.meta_step.method.zero_grad()
        plan = self._measured_plan(free, stage, tasks)
        fits = plan.chosen
        return GradmemError(
            f"out of memory at step {state.step} with `strategy: {state.strategy}` and `micro_batch_size: "
            f"{state.micro_batch_size}`; `strategy: {fits.strategy}` and `micro_batch_size: {fits.micro_batch_size}` "
            f"take {gigabytes(fits.bytes)} of {gigabytes(plan.budget)}: put these into the recipe and start again; "
            f"the last good state is kept in {self.output / 'states'}"
        )

    def _validate(self, stage: Stage, task: Task, spec: dict[str, Any], log: RunLog | None) -> list[Result]:
        """Measure the model on validation contexts, with control rows; only the main process does."""
        if log is None:
            return []
        state, method, steps = self.state, self.model.method.eval(), sorted(set(stage.write_steps))
        self.model.task, self.model.spec["task"] = task, spec
        with on_device(self.accelerator, method):
            results = evaluate(self.model, steps, self.recipe.valid_samples, self.recipe.seed, split="valid")
        method.train()
        now = {"step": state.step, "stage": state.stage, "samples": state.samples, "seconds": state.seconds}
        for r in results:
            low, high = r.ci95
            own = {"write_steps": r.steps, "exact_match": r.exact_match, "low": low, "high": high}
            log.validation(now | own | {name: getattr(r, name) for name in ("write_loss", "unwritten", "swapped")})
        shown = ", ".join(f"{r.exact_match:.2%} after {r.steps} steps" for r in results)
        last = results[-1]
        self.report.say(f"validation EM {shown}; unwritten {last.unwritten:.2%}, swapped {last.swapped:.2%}")
        return results

    def _add_elapsed(self, started: float) -> None:
        """Add the time since `started`; all processes use one clock, since learning rates depend on it."""
        seconds = self.state.seconds + clock() - started
        self.state.seconds = broadcast_object_list([seconds])[0]

    def _step(self, stage: Stage, tasks: list[Task]) -> dict[str, Any]:
        state, recipe = self.state, self.recipe
        ready, self.coming = self.coming, None
        now = state.stage, state.step
        draw = ready[1] if ready and ready[0] == now else self._draw(stage, tasks, state.step, state.samples)
        shown = self._backward(draw, self.recipe.weight_of(stage))
        norm = whole(self.accelerator.clip_grad_norm_(self.parameters, recipe.clip_norm))
        factor = lr_scale(recipe, stage, state)
        # If one process was told to stop, all stop: they would wait for it forever.
        told = torch.tensor([float(bool(self.stopped))]).to(shown, non_blocking=True)
        if self.accelerator.device.type != "cpu":  # which works on this step while the next batch is made
            coming = self._draw(stage, tasks, state.step + 1, state.samples + stage.batch_size)
            self.coming = (state.stage, state.step + 1), coming
        means = self.accelerator.reduce(torch.cat([shown, told]), "mean")
        numbers = torch.cat([means, norm.detach().to(shown)[None]])
        mean_loss, mean_write_loss, match, stop, grad_norm = numbers.tolist()
        self.stop = stop > 0
        if not (math.isfinite(grad_norm) and math.isfinite(mean_loss)):
            raise GradmemError(
                f"training diverged at step {state.step} (loss {mean_loss}, gradient norm {grad_norm}); the last "
                f"good state is kept in {self.output / 'states'}: lower the learning rates and resume"
            )
        for optimizer, base in zip(self.optimizers, self.base_lrs, strict=True):
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr * factor
            optimizer.step()
            optimizer.zero_grad()
        state.step, state.stage_step = state.step + 1, state.stage_step + 1
        state.samples += stage.batch_size
        state.recent = [*state.recent, match][-WINDOW:]
        return {
            "loss": mean_loss,
            "write_loss": mean_write_loss,
            "exact_match": match,
            "write_steps": draw.steps,
            "lr_scale": factor,
            "grad_norm": grad_norm,
        }

    def _draw(self, stage: Stage, tasks: list[Task], step: int, samples: int) -> Draw:
        """Draw the batch of an optimizer step, from the number of the step alone: a resumed run draws the same."""
        accelerator = self.accelerator
        if stage.batch_size % accelerator.num_processes:
            raise GradmemError(
                f"batch_size must be a multiple of the {accelerator.num_processes} processes, not {stage.batch_size}"
            )
        share = stage.batch_size // accelerator.num_processes
        numbers = random.Random(f"{self.recipe.seed} {step}")
        steps, task = numbers.choice(stage.write_steps), numbers.choice(tasks)
        batch = task.batch("train", samples + share * accelerator.process_index, share, self.recipe.seed)
        parts = [part.to(accelerator.device) for part in batch.split(self.state.micro_batch_size)]
        return Draw(steps, task, parts, len(batch.context), len(batch.rows), len(batch.targets))

    def _backward(self, draw: Draw, weight: float) -> Tensor:
        """Add up the gradients of the micro-batches; return loss, write loss and exact match of the batch."""
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
        method, progress = self.model.method, dataclasses.asdict(self.state)
        gather(self.meta_step.method, method)
        save_state(self.output / "states", self.state.step, method, self.optimizers, progress, write=self.main)
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _log(self) -> Iterator[RunLog | None]:
        """Open the log; only the main process writes one."""
        if self.main:
            with contextlib.closing(RunLog(self.output, self.state.step)) as log:
                yield log
        else:
            yield None
