"""Whether the card computes what the CPU does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradmem import MemoryModel, load
from gradmem.batch import Batch
from gradmem.evaluation import evaluate
from gradmem.ops.attention import attention
from gradmem.tasks.kv import KV
from gradmem.training.step import MetaStep

from . import ROOT
from .common import Row, device, products

PRECISIONS = ("fp32", "tf32", "bf16")


def parity(fixtures: Path | None) -> list[Row]:
    """Every fixture of the published implementation, on the card, to the tolerances of the tests."""
    if fixtures is None or not fixtures.is_dir():
        return [{"skipped": "no --fixtures"}]
    given = {"GRADMEM_TEST_DEVICE": device().type, "GRADMEM_PARITY_DIR": str(fixtures.resolve())}
    given["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    options = ["-q", "-p", "no:cacheprovider", "-o", "addopts="]
    command = [sys.executable, "-m", "pytest", *options, "tests/methods/test_parity.py"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | given, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return [{"passed": done.returncode == 0, "pytest": lines[-1] if lines else done.stderr[-300:], "failed": failed}]


def derivatives() -> list[Row]:
    """Attention with its first and second derivatives, against the plain formula in float64 on the CPU."""
    rows = []
    for shape in ((2, 4, 4, 65, 65, 32), (2, 9, 3, 200, 232, 64)):
        batch, heads, key_heads, queries, keys, width = shape
        made = torch.Generator().manual_seed(0)
        sizes = [(batch, heads, queries, width), *[(batch, key_heads, keys, width)] * 2]
        tensors = [torch.randn(size, generator=made, dtype=torch.float64) for size in sizes]
        weight = torch.randn(batch, queries, heads, width, generator=made, dtype=torch.float64)
        wanted = _twice(_plain, tensors, weight)
        for dtype in (torch.float64, torch.float32):
            moved = [tensor.to(device(), dtype) for tensor in tensors]
            found = _twice(lambda q, k, v: attention(q, k, v, scaling=0.1), moved, weight.to(device(), dtype))
            rows.append({"shape": str(shape), "dtype": str(dtype), "error": _worst(found, wanted)})
    return rows


def _plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    groups, queries, keys = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    scores = (query @ key.mT * 0.1).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def _twice(function: Callable[..., Tensor], tensors: list[Tensor], weight: Tensor) -> list[Tensor]:
    """The output, its gradients, and the gradients of their squared norm."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    first = torch.autograd.grad((out * weight).sum(), leaves, create_graph=True)
    second = torch.autograd.grad(torch.stack([grad.square().sum() for grad in first]).sum(), leaves)
    return [out, *first, *second]


def _worst(found: list[Tensor], wanted: list[Tensor]) -> float:
    pairs = zip(found, wanted, strict=True)
    return max(float((a.detach().cpu().double() - b.detach()).norm() / b.detach().norm()) for a, b in pairs)


def meta_gradients(settings: list[tuple[str, int]], contexts: int = 2) -> list[Row]:
    """Each strategy in each precision, against the CPU in float32: relative error and cosine of all gradients.

    Settings are a packaged checkpoint and the pairs of a context.
    """
    rows = []
    for name, pairs in settings:
        model = load(name)
        batch = KV(pairs=pairs).batch("valid", 0, contexts)
        wanted = _meta_gradient(model, batch, "recompute", "fp32", torch.device("cpu"))
        for precision in PRECISIONS:
            for strategy in ("recompute", "unroll"):
                found = _meta_gradient(model, batch, strategy, precision, device())
                error, cosine = (found - wanted).norm() / wanted.norm(), found @ wanted / found.norm() / wanted.norm()
                row = {"checkpoint": name, "pairs": pairs, "K": model.method.write_steps}
                row |= {"strategy": strategy, "precision": precision}
                rows.append(row | {"error": float(error), "cosine": float(cosine)})
    return rows


def _meta_gradient(model: MemoryModel, batch: Batch, strategy: Any, precision: Any, where: torch.device) -> Tensor:
    method, moved = model.method.to(where).train(), batch.to(where)
    method.strategy = strategy
    method.zero_grad()
    with products(precision):
        step, scored = MetaStep(method, precision), model.task.scored(moved.labels)
        step(moved, method.write_steps, scored, False)[0].backward()
    grads = [p.grad.flatten() for p in method.parameters() if p.grad is not None]
    return torch.cat(grads).cpu().double()


def waits(name: str) -> list[Row]:
    """A whole meta-gradient with synchronising calls turned into errors."""
    if not torch.cuda.is_available():
        return [{"skipped": "no CUDA"}]
    model = load(name)
    model.method.to(device()).train()
    step = MetaStep(model.method, "tf32")
    for strict in (False, True):
        batch = model.task.batch("train", 0, 8).to(device())
        scored = model.task.scored(batch.labels)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if strict else "default")
        try:
            loss, *_ = step(batch, model.method.write_steps, scored, False)
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [{"checkpoint": name, "waits": 0}]


def answers(samples: int = 200) -> list[Row]:
    """Exact match of `kv-32` with its controls, and answers to words."""
    model = load("kv-32").to(device())
    (result,) = evaluate(model, [5], samples, seed=1)
    memory = model.write("a7:Qz\nk2:9f\nzz:aa")
    return [
        {
            "checkpoint": "kv-32",
            "samples": samples,
            "exact_match": result.exact_match,
            "unwritten": result.unwritten,
            "swapped": result.swapped,
            "asked": str(memory.ask(["a7", "k2", "zz"])),
        }
    ]
