"""Training and use on a device that is not the CPU: nothing mixes the two, and a training step waits for nothing."""

from __future__ import annotations

import csv
import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate import Accelerator

import gradmem
import standin
from gradmem.cli import main as cli
from gradmem.cli import store as store_commands
from gradmem.device import device_named
from gradmem.errors import GradmemError
from gradmem.evaluation.calibrate import calibrate
from gradmem.evaluation.measurement import evaluate
from gradmem.methods import ARMT, RMT, FullContext, GradMem, Mamba, MeanPool, Method
from gradmem.model import MemoryModel
from gradmem.serving.engine import Engine
from gradmem.training import Recipe, Stage
from gradmem.training.plan import SHARE, make_plan
from gradmem.training.step import MetaStep, outer_loss
from gradmem.training.trainer import Trainer
from helpers import assert_same_gradients, distance, make_batch, make_method, tiny_model

pytestmark = pytest.mark.skipif(bool(standin.MISSING), reason=standin.MISSING)

LEARNED = {"learn_inner_lr": True, "learn_momentum": True, "write_steps": 3, "n_mem": 3, "inner_lr": 0.3}
CHUNKED = {mode: {**LEARNED, "chunk_size": 4, "chunk_mode": mode} for mode in ("joint", "sequential", "independent")}
MAMBA = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "residual_in_fp32": False}
METHODS: dict[str, tuple[type[Method], str, dict[str, Any]]] = {
    "whole": (GradMem, "llama", LEARNED),
    **{mode: (GradMem, "llama", options) for mode, options in CHUNKED.items()},
    "reconstruction": (
        GradMem,
        "gpt2",
        {"reconstruction": True, "n_ctrl": 2, "projection": "per_sample", "clip_norm": 1.0, "clip_value": 1.0},
    ),
    "reconstruction of chunks": (
        GradMem,
        "qwen2",
        {"reconstruction": True, "n_ctrl": 1, "inner_optimizer": "adam", "write_head": "copy", **CHUNKED["independent"]}
        | {"learn_momentum": False},
    ),
    "adapters": (GradMem, "llama", {"write_lora": 2, "read_lora": 2}),
    "gauss_newton": (GradMem, "gpt2", {"gauss_newton_after": 1, "chunk_size": 4, "chunk_mode": "joint"}),
    "rmt": (RMT, "llama", {"n_mem": 3, "reconstruction": True, "residual": True}),
    "rmt sequential": (RMT, "llama", {"n_mem": 3, "chunk_size": 3}),
    "rmt independent": (RMT, "llama", {"n_mem": 3, "chunk_size": 3, "chunk_mode": "independent", "n_ctrl": 1}),
    "armt": (ARMT, "llama", {"n_mem": 2, "d_mem": 4, "segment_length": 3, "reconstruction": True}),
    "full_context": (FullContext, "llama", {}),
    "mean_pool": (MeanPool, "llama", {"n_mem": 3}),
    "mamba": (Mamba, "mamba", {"config": MAMBA, "reconstruction": True}),
}
STEPS = {"whole": (1, 3), "joint": (1, 3), "sequential": (1, 3), "independent": (1, 3)}


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The device, switched on."""
    with standin.standin() as found:
        yield found


def test_the_device_refuses_what_a_gpu_refuses(device: torch.device) -> None:
    there, here = torch.ones(3, device=device), torch.ones(3)
    for mixed in (lambda: there + here, lambda: here + there, lambda: torch.cat([there, here])):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    assert (there + torch.tensor(1.0) + 1).tolist() == [3, 3, 3]


def test_the_device_counts_what_a_gpu_waits_for(device: torch.device) -> None:
    there, flags = torch.arange(3, device=device), torch.tensor([True, False, True]).to(device, non_blocking=True)
    waits: list[Any] = [
        lambda: there.tolist(),
        lambda: there[0].item(),
        lambda: bool(flags.all()),
        lambda: float(there.sum()),
        lambda: there.cpu(),
        lambda: there[flags],
        lambda: there[torch.tensor([0, 1])],
        lambda: flags.nonzero(),
        lambda: there.repeat_interleave(there),
        lambda: torch.equal(there, there),
        lambda: torch.tensor([1, 2], device=device),
        lambda: torch.zeros(3).to(device),
        lambda: torch.accelerator.synchronize(device),
    ]
    for wait in waits:
        with standin.waiting() as counted:
            wait()
        assert counted.total() == 1, counted
    with standin.waiting() as counted:
        there = there.masked_fill(flags, 7) + torch.zeros(3).to(device, non_blocking=True)
        there[flags] = 5
        there[there.argsort()[:2]] = torch.zeros_like(there[:2])
    assert not counted
    assert there.tolist() == [0, 0, 5] or there.tolist() == [5, 0, 0]


def step(name: str, steps: int, strategy: Any, device: Any = "cpu") -> tuple[list[torch.Tensor], Any, Any]:
    """A training step on a device: its results, gradients on the CPU, and what was waited for."""
    cls, kind, options = METHODS[name]
    method, batch = make_method(cls, kind, **options).to(device), make_batch().to(device)
    method.train()
    method.strategy = strategy
    scored = (batch.labels != -100).to(torch.bool)
    assert method.backbone.takes_masks is not None  # what is probed once is probed now
    with standin.waiting() as counted:
        loss, write_loss, correct = MetaStep(method)(batch, steps, scored, True)
        outer_loss(loss, write_loss, 0.5).backward()
        waited = dict(counted)
    grads = {name: p.grad.cpu() for name, p in method.named_parameters() if p.grad is not None}
    return [loss.cpu(), write_loss.cpu(), correct.cpu()], grads, waited


@pytest.mark.parametrize("name", METHODS)
def test_a_training_step_waits_for_nothing(name: str) -> None:
    for steps in STEPS.get(name, (2,)):
        results, grads, _ = step(name, steps, "unroll")
        for strategy in ("recompute", "unroll") if steps > 1 else ("recompute",):
            with standin.standin() as device:
                found, theirs, waited = step(name, steps, strategy, device)
            assert waited == {}
            for got, wanted in zip(found, results, strict=True):
                assert distance(got.double(), wanted.double()) < 1e-9
            assert_same_gradients(theirs, grads, 1e-8)


BACKBONE = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}


class _There(Accelerator):
    """As Accelerate would find the device."""

    @property
    def device(self) -> torch.device:
        return torch.device(standin.NAME, 0)


def test_training_looks_at_numbers_once_a_step(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradmem.training.sharding.Accelerator", _There)
    method = {"name": "gradmem", "n_mem": 2, "write_steps": 2, "inner_lr": 0.3, "chunk_size": 8, "chunk_mode": "joint"}
    stage = Stage(max_steps=3, write_steps=[1, 2], batch_size=4, warmup_steps=1, decay_steps=1)
    recipe = Recipe(
        {"name": "kv", "pairs": 2}, BACKBONE, method, [stage], save_every=2, valid_samples=4, strategy="unroll"
    )
    trainer = Trainer(recipe, tmp_path / "run", "never")
    waited, own = [], Trainer._step

    def counted(self: Trainer, *given: Any) -> Any:
        with standin.waiting() as counts:
            row = own(self, *given)
            waited.append(dict(counts))
        return row

    monkeypatch.setattr(Trainer, "_step", counted)
    model = trainer.run()
    assert model.device.type == standin.NAME
    assert len(waited) == 3
    for counts in waited:
        (where, times) = next(iter(counts.items()))
        assert len(counts) == times == 1, counts
        assert "training/trainer.py" in where


def test_each_stage_trains_on_its_own_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch that is made ahead on a device is never one of the stage before."""
    method = {"name": "gradmem", "n_mem": 2, "write_steps": 1, "inner_lr": 0.3}
    stages = [
        Stage(max_steps=2, write_steps=[1], batch_size=size, warmup_steps=1, tasks=[{"pairs": pairs}])
        for size, pairs in ((4, 2), (2, 3))
    ]
    options: dict[str, Any] = {"save_every": 9, "valid_samples": 4, "strategy": "recompute", "micro_batch_size": 4}
    recipe = Recipe({"name": "kv", "pairs": 2}, BACKBONE, method, stages, precision="fp32", **options)

    def losses(name: str) -> list[float]:
        Trainer(recipe, tmp_path / name, "never").run()
        with (tmp_path / name / "log.csv").open(newline="") as file:
            return [float(row["loss"]) for row in csv.DictReader(file)]

    recipe.device = "cpu"
    wanted = losses("here")
    recipe.device = "auto"
    monkeypatch.setattr("gradmem.training.sharding.Accelerator", _There)
    with standin.standin():
        assert losses("there") == pytest.approx(wanted, rel=1e-4)


SPECS: dict[str, dict[str, Any]] = {
    "gradmem": {"name": "gradmem", "n_mem": 8, "write_steps": 2, "inner_lr": 0.3},
    "joint": {"name": "gradmem", "n_mem": 8, "write_steps": 2, "inner_lr": 0.3, "chunk_size": 9, "chunk_mode": "joint"},
    "independent": {"name": "gradmem", "n_mem": 2, "write_steps": 2, "inner_lr": 0.3, "chunk_size": 9}
    | {"chunk_mode": "independent"},
    "armt": {"name": "armt", "n_mem": 2, "d_mem": 4},
    "full_context": {"name": "full_context"},
    "mamba": {"name": "mamba"},
}
TEXTS = ["a7:Qz", "a7:Qz\nk2:5m\n0b:xY", "11:22\n33:44"]


def model_on(device: Any, name: str) -> MemoryModel:
    backbone = {"model_type": "mamba", **MAMBA} if name == "mamba" else BACKBONE
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MemoryModel.from_spec({"name": "kv", "pairs": 3}, backbone, SPECS[name]).to(device)


def used(device: Any, name: str, folder: Path) -> dict[str, Any]:
    """What a model measures, writes, answers and reads back on a device."""
    model, queries = model_on(device, name), ["a7", "zz", "k2"]
    memory = model.open(model.write(TEXTS[1]).save(folder / "memory.safetensors"))
    floats = [tensor for tensor in memory.tensors.values() if tensor.is_floating_point()]
    assert {tensor.device.type for tensor in floats} == {torch.device(device).type}
    many = model.write(TEXTS)
    with Engine(model, max_wait_ms=50) as engine:
        written = engine.write(TEXTS[0]).result()
        served = [engine.ask(i, m, q) for i, m in enumerate([memory, written]) for q in queries]
        answers = [answer.result() for answer in served]
    found = {
        "exact": [memory.ask(queries), many.ask([["a7"], ["a7", "0b"], ["33"]])],
        "receipts": [receipt.loss_after for receipt in [*memory.receipts, *many.receipts]],
        "answers": [[getattr(answer, n) for n in NUMBERS] for answer in [*memory.answer(queries), *answers]],
        "measured": [[r.exact_match, r.unwritten, r.swapped] for r in evaluate(model, None, samples=4, seed=2)],
    }
    if name != "joint":
        found["exact"].append(memory.reconstruct())
    if name in ("joint", "independent"):
        longer = model.append(memory, "c4:d5", may_forget=True)
        found["exact"].append(longer.ask([*queries, "c4"]))
        found["receipts"] += [receipt.loss_after for receipt in longer.history]
    return found


NUMBERS = ("logprob", "lowest", "margin", "near_loss")


@pytest.mark.parametrize("name", SPECS)
def test_using_a_model_there_gives_what_it_gives_here(name: str, tmp_path: Path) -> None:
    """Writing, files, asking with evidence, serving, reading back and measuring, in float32."""
    wanted = used("cpu", name, tmp_path)
    with standin.standin() as device:
        found = used(device, name, tmp_path)
    assert found.pop("exact") == wanted.pop("exact")
    for what, numbers in wanted.items():
        torch.testing.assert_close(torch.tensor(found[what]), torch.tensor(numbers), atol=1e-3, rtol=1e-3)


def test_calibration_there_is_that_of_here() -> None:
    wanted = calibrate(gradmem.load("kv-16"), 8, seed=2)
    with standin.standin() as device:
        found = calibrate(gradmem.load("kv-16").to(device), 8, seed=2)
    assert found.answers.keys() == wanted.answers.keys()
    for kind, answers in wanted.answers.items():
        assert [answer.text for answer in found.answers[kind]] == [answer.text for answer in answers]
        judged = [answer.written for answer in found.answers[kind]]
        assert judged == pytest.approx([answer.written for answer in answers], abs=0.02)


COMMANDS = {"write", "ask", "restore", "eval", "sweep", "compare", "calibrate", "board", "serve", "demo"}
COMMANDS |= {"join", "replace", "forget", "mcp"}


def test_every_command_that_runs_a_model_takes_a_device_and_finds_it_by_default() -> None:
    taking = {name for name, function in cli.COMMANDS.items() if "device" in inspect.signature(function).parameters}
    assert taking == COMMANDS
    functions = [cli.COMMANDS[name] for name in COMMANDS] + [store_commands.append]
    assert {inspect.signature(function).parameters["device"].default for function in functions} == {"auto"}


def test_commands_run_on_the_accelerator_where_there_is_one(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, to = [], MemoryModel.to
    monkeypatch.setattr(
        MemoryModel, "to", lambda self, where: found.append(torch.device(where).type) or to(self, where)
    )
    model, file = str(tmp_path / "model"), tmp_path / "memory.safetensors"
    tiny_model(0).save_pretrained(model)
    (tmp_path / "text").write_text(TEXTS[1])
    lines = [
        ["write", model, str(tmp_path / "text"), "-o", str(file)],
        ["ask", str(file), "a7"],
        ["restore", str(file), "-o", str(tmp_path / "restored")],
        ["eval", model, "--samples", "2", "--steps", "1"],
        ["ask", str(file), "a7", "--device", "cpu"],
    ]
    for number, line in enumerate(lines):
        assert cli.main(line) == 0
        assert len(found) == number + 1
    assert found == [standin.NAME] * 4 + ["cpu"]


@pytest.mark.parametrize("name", ["gpu", "cuda:9", "meta", "", f"{standin.NAME}:1"])
def test_a_device_that_is_not_here_is_refused(name: str, device: torch.device, capsys: Any) -> None:
    assert cli.main(["serve", "--port", "0", "--device", name]) == 2
    assert f"no device '{name}': use auto, cpu or {standin.NAME}" in capsys.readouterr().err


def test_devices_by_name(device: torch.device) -> None:
    assert device_named("auto").type == device_named(standin.NAME).type == standin.NAME
    assert device_named("cpu") == device_named("cpu:0") == torch.device("cpu")
    with standin.absent():
        assert device_named("auto") == torch.device("cpu")
        with pytest.raises(GradmemError, match=r"use auto, cpu$"):
            device_named(standin.NAME)


@pytest.mark.parametrize(
    ("count", "options", "there"),
    [(1, [], False), (2, [], True), (2, ["--device", standin.NAME], True), (2, ["--device", "cpu"], False)],
    ids=str,
)
def test_processes_have_a_device_each_or_the_cpu(
    count: int,
    options: list[str],
    there: bool,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    launched: list[list[str]] = []
    monkeypatch.setattr(standin.Standin, "count", count)
    monkeypatch.setattr("torch.distributed.run.main", launched.append)
    monkeypatch.setattr("os.environ", {k: v for k, v in os.environ.items() if k not in ("RANK", "OMP_NUM_THREADS")})
    given = ["train", "kv-32", "--processes", "2", *options]
    assert cli.main(given) == 0
    started = launched[0][launched[0].index("train") :]
    assert started == given if there else started == [*given, "--device", "cpu"]
    assert os.environ.get("OMP_NUM_THREADS") == (None if there else "1")
    said = f"2 processes and 1 {standin.NAME} device: training on the CPU"
    assert (said in capsys.readouterr().err) == (count < 2)


def test_more_processes_than_devices_that_were_named_are_refused(
    device: torch.device, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "kv-32", "--processes", "2", "--device", standin.NAME]) == 2
    assert "give at most --processes 1, or --device cpu" in capsys.readouterr().err


def test_a_process_with_a_device_of_its_own_has_all_of_its_memory(device: torch.device) -> None:
    plans = [
        make_plan(lambda strategy, contexts: None, 4, 10, place, micro_batch_size=1, processes=2)
        for place in (device, torch.device("cpu"))
    ]
    assert plans[0].budget == int(SHARE * torch.accelerator.get_memory_info(device)[0])
    assert 2 * plans[1].budget < SHARE * psutil.virtual_memory().total
