"""Meta-train SmolLM2-135M to answer from 32 vectors in a few minutes of one GPU, and measure it.

The recipe is `english-pooled`, from the pretrained weights: where there are contexts enough, the first stage teaches to
answer with a few words too.

    python -m benchmarks.gpu.english --model DIR --data DIR --minutes 4 --out DIR

DATA holds `samples.xz` and `dev.jsonl` of `benchmarks.gpu.samples`, or all the texts of the recipe. OUT gets the
difference to the pretrained weights (`delta-*`; by the rank of LoRA, or in four bits), `results.json`, `curve.csv` and
`answers.json`. The whole weights go to --state as soon as training ends, however it ends; --resume takes them from
there and only measures.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import math
import random
import statistics
import time
import traceback
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor

from gradmem.batch import Batch
from gradmem.lora import merged
from gradmem.model import MemoryModel
from gradmem.model.build import build_task
from gradmem.model.delta import base_weights, rounded, save_delta
from gradmem.tasks.qa import QA
from gradmem.training.optimizers import build_optimizers
from gradmem.training.recipe import Recipe, Stage, load_recipe
from gradmem.training.step import MetaStep, outer_loss

from .english_answers import measure
from .samples import load_samples, tasks_of

SHOW = 5.0
"""Seconds between lines."""
WORSE = 1.0
"""Nats by which the loss may rise above its best before the learning rates are halved."""
BAD = 20
"""Steps without a finite gradient, one after the other, that end the training."""


def say(*words: object) -> None:
    """One line, at once."""
    print(f"[{time.strftime('%H:%M:%S')}]", *words, flush=True)


def settings() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or GGUF file of the pretrained model")
    parser.add_argument("--name", default="smollm2-135m", help="what those who load the result call that model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", default="english-pooled")
    parser.add_argument(
        "--minutes", type=float, default=4.0, help="of training, shared by the stages as their steps are"
    )
    parser.add_argument("--eval-seconds", type=float, default=60.0, help="of measuring, at most")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--exact", action="store_true", help="no tf32")
    parser.add_argument("--lr", type=float, default=1.0, help="factor on the learning rates")
    parser.add_argument("--batch", type=int, default=64, help="contexts of a step; 0 for the recipe's")
    parser.add_argument("--micro", type=int, default=0, help="contexts of a pass; halved where memory does not suffice")
    parser.add_argument(
        "--max-steps", type=int, default=0, help="end after so many steps, whatever the time: a dry run"
    )
    parser.add_argument("--valid", type=int, default=1000, help="validation contexts")
    parser.add_argument("--test", type=int, default=1000, help="dev contexts")
    parser.add_argument("--state", type=Path, default=Path("/tmp/english-state.safetensors"))
    parser.add_argument("--resume", action="store_true", help="measure the weights of --state")
    return parser.parse_args()


# Training


@dataclass
class Clock:
    """How far a run is, by time or by steps, and what that means for stage and learning rate."""

    stages: Sequence[Stage]
    seconds: float
    max_steps: int

    def __post_init__(self) -> None:
        self.begin, self.step = time.perf_counter(), 0
        total = sum(stage.max_steps for stage in self.stages)
        self.shares = [stage.max_steps / total for stage in self.stages]

    @property
    def elapsed(self) -> float:
        """Seconds since training began."""
        return time.perf_counter() - self.begin

    @property
    def done(self) -> float:
        """Part of the run that is over."""
        return self.step / self.max_steps if self.max_steps else self.elapsed / self.seconds

    def now(self) -> tuple[int, float]:
        """The stage, and the factor on the learning rates that its decay asks for."""
        at, before = min(self.done, 1.0), 0.0
        for number, (stage, share) in enumerate(zip(self.stages, self.shares, strict=True)):
            if at < before + share or number == len(self.stages) - 1:
                decay = share * stage.decay_steps / stage.max_steps
                left = (before + share - at) / decay if decay else 1.0
                return number, stage.lr_scale * min(1.0, max(left, 0.0))
            before += share
        raise AssertionError


class Training:
    """The loop: steps until the time is over."""

    def __init__(self, model: MemoryModel, recipe: Recipe, tasks: list[QA], given: argparse.Namespace) -> None:
        self.model, self.recipe, self.tasks, self.given = model, recipe, tasks, given
        self.sizes = [given.batch or stage.batch_size for stage in recipe.stages]
        self.micro: dict[int, int] = {}
        self.contexts = 0
        self.module = MetaStep(model.method, recipe.precision)
        self.optimizers = build_optimizers(model.method, recipe)
        self.rates = [[group["lr"] for group in one.param_groups] for one in self.optimizers]
        self.parameters = [p for p in model.method.parameters() if p.requires_grad]
        self.rows: list[dict[str, Any]] = []
        self.halved, self.skipped, self.bad = 1.0, 0, 0
        model.method.strategy = "unroll" if recipe.strategy == "auto" else recipe.strategy

    def run(self) -> dict[str, Any]:
        """Train; return what it took."""
        clock = Clock(self.recipe.stages, 60 * self.given.minutes, self.given.max_steps)
        window: deque[dict[str, Any]] = deque(maxlen=50)
        shown, stage, losses = 0.0, -1, deque[float](maxlen=20)
        best = math.inf
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(self._draw, 0, 0)
            while clock.done < 1:
                number, factor = clock.now()
                if number != stage:
                    stage, best = number, math.inf
                    losses.clear()
                    say(f"stage {stage + 1}: K {self.recipe.stages[stage].write_steps}")
                batch = coming.result()
                coming = pool.submit(self._draw, number, self.contexts + len(batch.context))
                warm = min(1.0, (clock.step + 1) / self.recipe.stages[0].warmup_steps)
                row = self._step(batch, number, clock.step, factor * warm * self.given.lr * self.halved)
                clock.step += 1
                self.contexts += len(batch.context)
                row |= {"step": clock.step, "seconds": clock.elapsed, "contexts": self.contexts}
                self.rows.append(row)
                window.append(row)
                losses.append(row["loss"])
                mean = sum(losses) / len(losses)
                if len(losses) == losses.maxlen:
                    best = min(best, mean)
                    if not mean < best + WORSE:
                        self.halved, best = self.halved / 2, math.inf
                        losses.clear()
                        say(f"the loss has risen: learning rates x {self.halved}")
                if clock.elapsed - shown >= SHOW or clock.step <= 3 or self.given.max_steps:
                    shown = clock.elapsed
                    self._show(window)
        return {
            "seconds": clock.elapsed,
            "steps": clock.step,
            "contexts": self.contexts,
            "contexts_per_second": self.contexts / clock.elapsed,
            "micro_batch_size": self.micro,
            "skipped": self.skipped,
            "halved": self.halved,
            "peak_bytes": torch.cuda.max_memory_allocated() if self.given.device == "cuda" else None,
        }

    def _draw(self, stage: int, start: int) -> Batch:
        size = self.sizes[stage]
        # A whole number of batches on: only those have contexts of about one length.
        return self.tasks[stage].batch("train", -(-start // size) * size, size, self.recipe.seed)

    def _show(self, window: Sequence[dict[str, Any]]) -> None:
        last = window[-1]
        mean = {name: statistics.fmean(row[name] for row in window) for name in ("loss", "write_loss", "exact_match")}
        first = window[0]
        speed = (
            (last["contexts"] - first["contexts"]) / (last["seconds"] - first["seconds"]) if len(window) > 1 else 0.0
        )
        say(
            f"step {last['step']} {last['seconds']:.0f} s {speed:.1f} contexts/s K {last['write_steps']} "
            f"loss {mean['loss']:.3f} reconstruction {mean['write_loss']:.3f} EM {mean['exact_match']:.1%} "
            f"norm {statistics.median(row['grad_norm'] for row in window):.2f} lr x{last['lr']:.3g} "
            f"length {last['length']}"
        )

    def _step(self, batch: Batch, number: int, step: int, factor: float) -> dict[str, Any]:
        stage = self.recipe.stages[number]
        steps = random.Random(f"{self.recipe.seed} {step}").choice(stage.write_steps)
        weight = self.recipe.weight_of(stage)
        micro = min(self.micro.setdefault(steps, self.given.micro or len(batch.context)), len(batch.context))
        while True:
            try:
                shown = self._backward(batch, self.tasks[number], steps, weight, micro)
                break
            except torch.OutOfMemoryError:
                if micro == 1:
                    raise
            self.micro[steps] = micro = -(-micro // 2)
            self.model.method.zero_grad()
            gc.collect()  # what failed may be held in circles
            torch.cuda.empty_cache()
            say(f"out of memory with K = {steps}: {micro} contexts at a time from here on")
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_norm))
        if math.isfinite(norm):
            self.bad = 0
            for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
                optimizer.step()
        else:
            self.skipped, self.bad = self.skipped + 1, self.bad + 1
            if self.bad > BAD:
                raise RuntimeError("no finite gradient any more")
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss, write_loss, match = shown.tolist()
        about = {"stage": number + 1, "write_steps": steps, "lr": factor, "grad_norm": norm}
        about["length"] = batch.context.ids.shape[1]
        return {"loss": loss, "write_loss": write_loss, "exact_match": match, **about}

    def _backward(self, batch: Batch, task: QA, steps: int, weight: float, micro: int) -> Tensor:
        """Add up the gradients of the parts of a batch; return its loss, write loss and exact match."""
        tokens = len(batch.targets)
        shown = torch.zeros(3, device=self.given.device)
        # Split where they were made: to look at them on a GPU would wait for it.
        for part in [part.to(self.given.device) for part in batch.split(micro)]:
            loss, write_loss, correct = self.module(part, steps, task.scored(part.labels), weight > 0)
            loss, write_loss = loss / tokens, write_loss * len(part.context) / len(batch.context)
            outer_loss(loss, write_loss, weight).backward()
            match = correct.sum() / len(batch.rows)
            shown += torch.stack([loss.detach(), write_loss.detach(), match])
        return shown


def round_weights(model: MemoryModel, pretrained: str) -> float:
    """Let the weights be what they will be after they have travelled; return how far that moves them, relatively."""
    base, moved, way = base_weights(pretrained), 0.0, 0.0
    with torch.no_grad():
        for key, weight in model.method.state_dict().items():
            if key in base and base[key].shape == weight.shape:
                start = base[key].to(weight.device)
                new = rounded(weight, start)
                moved, way = moved + float((new - weight).square().sum()), way + float((weight - start).square().sum())
                weight.copy_(new)
    return math.sqrt(moved / max(way, 1e-30))


# All of it


def build(given: argparse.Namespace) -> tuple[MemoryModel, Recipe, list[QA]]:
    """Model, recipe and the task of each stage."""
    recipe, data = load_recipe(given.recipe), given.data
    carried = (data / "samples.xz").is_file()
    tasks = tasks_of(recipe, given.model, data)
    if carried:
        load_samples(tasks, data / "samples.xz")
    spec = {**recipe.task, "tokenizer": given.model}
    dev = data / "dev.jsonl" if carried else data / "squad_subset/dev.jsonl"
    test = build_task({**spec, "data": str(dev), "max_words": 100})
    assert isinstance(test, QA)
    tasks[-1]._loaded["test"] = test.samples("test")
    torch.manual_seed(recipe.seed)
    model = MemoryModel.from_spec(spec, recipe.backbone | {"pretrained": given.model}, recipe.method)
    return model.to(given.device), recipe, tasks


def report(model: MemoryModel, task: QA, given: argparse.Namespace, results: dict[str, Any], rounds: bool) -> None:
    """Measure; what is known is written at once. Weights that travel in four bits are first rounded to these."""
    end = time.perf_counter() + given.eval_seconds
    model.method.eval()

    def keep(name: str, value: Any) -> None:
        results[name] = value
        say(name, json.dumps(value))
        (given.out / "results.json").write_text(json.dumps(results, indent=1))

    plain = measure(model, task, "valid", given.valid, [1, 2, 3, 4, 5], False, end)
    keep("valid", plain.table())
    best = max(range(1, 6), key=lambda k: statistics.fmean(plain.scores.get(f"K={k} exact_match", [0.0])))
    keep("chosen K", best)
    if rounds:
        keep("rounding moves the weights by", round_weights(model, given.model))
        keep("valid, four bits", measure(model, task, "valid", given.valid, [best], False, end).table())
    dev = measure(model, task, "test", given.test, [best], True, end)
    keep("dev", dev.table())
    (given.out / "answers.json").write_text(json.dumps({"rows": dev.rows, **dev.answers}))
    keep("inner rates", sorted(model.method.inner_lrs()))


def main() -> None:
    """Train, save, measure."""
    given = settings()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.device == "cuda" and not given.exact:
        torch.set_float32_matmul_precision("high")  # for all of the process: also to write and to answer
    started = time.perf_counter()
    model, recipe, tasks = build(given)
    machine = torch.cuda.get_device_name() if given.device == "cuda" else "cpu"
    results: dict[str, Any] = {"machine": machine, "torch": torch.__version__, "recipe": given.recipe}
    results["setup seconds"] = time.perf_counter() - started
    say(f"{machine}, torch {torch.__version__}; ready after {results['setup seconds']:.0f} s;", end_of(tasks[-1]))
    if given.resume:
        load_model(model.method, str(given.state))
    else:
        training = Training(model, recipe, tasks, given)
        try:
            results["training"] = training.run()
            say("training", json.dumps(results["training"]))
        except BaseException:
            traceback.print_exc()
            results["failed"] = traceback.format_exc()
        finally:
            training.model.method.zero_grad()
            save_model(model.method, str(given.state))
            with (given.out / "curve.csv").open("w", newline="") as file:
                if training.rows:
                    writer = csv.DictWriter(file, list(training.rows[0]))
                    writer.writeheader()
                    writer.writerows(
                        {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in r.items()} for r in training.rows
                    )
            del training
    if given.device == "cuda":
        torch.cuda.empty_cache()
    with merged(model.method):
        rank = recipe.backbone.get("lora")
        files = save_delta(model, given.model, given.out, given.name, rank)
        results["bytes"] = {file.name: file.stat().st_size for file in files}
        say("saved", json.dumps(results["bytes"]))
        try:
            report(model, tasks[-1], given, results, rank is None)
        except BaseException:
            traceback.print_exc()
            results["measuring failed"] = traceback.format_exc()
    (given.out / "results.json").write_text(json.dumps(results, indent=1))
    say(f"done after {time.perf_counter() - started:.0f} s")


def end_of(task: QA) -> str:
    """What there is to train and to measure on, in words."""
    test = task.samples("test")
    counts = [f"{len(part)} {pattern}" for pattern, part in zip(task.mix, task.parts, strict=True)]
    return f"{', '.join(counts)}; {len(task.samples('valid'))} validation contexts, {len(test)} dev contexts"


if __name__ == "__main__":
    main()
