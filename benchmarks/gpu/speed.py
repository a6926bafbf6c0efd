"""How fast one card is: meta-gradients, and queries from memory against a kept KV-cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import naive
from benchmarks.shapes import SMOLLM2
from gradmem import Backbone, Batch, GradMem, Tokens, load
from gradmem.methods import FullContext, Method
from gradmem.model_runner import _one_sequence_a_row
from gradmem.tasks.kv import KV
from gradmem.training.step import MetaStep

from .common import Row, device, products, say, synchronize, timed

ANSWER = 12
"""Query and target tokens of a text."""
Ways = list[tuple[Any, Any]]
"""Strategies and precisions."""


@dataclass
class Setting:
    """A training step without its optimiser."""

    name: str
    method: GradMem
    batch: Batch
    write_steps: int

    @classmethod
    def packaged(cls, name: str, contexts: int) -> Setting:
        """Contexts of a packaged checkpoint, all of their queries asked."""
        model = load(name)
        method = model.method
        assert isinstance(method, GradMem)
        return cls(f"{name} B{contexts}", method, model.task.batch("train", 0, contexts), method.write_steps)._there()

    @classmethod
    def pairs(cls, pairs: int, write_steps: int, contexts: int) -> Setting:
        """The paper's model and one query for each context, all written whole."""
        method = load("kv-96", {"chunk_size": None}).method
        assert isinstance(method, GradMem)
        batch = KV(pairs=pairs, queries=1).batch("train", 0, contexts)
        return cls(f"N{pairs}-K{write_steps}-B{contexts}", method, batch, write_steps)._there()

    @classmethod
    def text(cls, length: int, write_steps: int, contexts: int, queries: int = 1) -> Setting:
        """SmolLM2's shape, and so many queries for each text."""
        torch.manual_seed(0)
        method = GradMem(Backbone.from_config(SMOLLM2), n_mem=32, write_head="none", inner_lr=1.0)
        ids = torch.randint(SMOLLM2["vocab_size"], (contexts, length))
        asked = torch.randint(SMOLLM2["vocab_size"], (contexts * queries, ANSWER))
        context, some = (Tokens(rows, torch.ones_like(rows, dtype=torch.bool)) for rows in (ids, asked))
        batch = Batch(context, some, asked.clone(), torch.arange(contexts).repeat_interleave(queries))
        return cls(f"T{length}-K{write_steps}-B{contexts}-Q{queries}", method, batch, write_steps)._there()

    def _there(self) -> Setting:
        self.method.to(device()).train()
        self.batch = self.batch.to(device())
        backbone = self.method.backbone
        attention, forms = backbone.double_backward_attention, len(backbone.closed_forms)
        say(f"    {self.name}: attention {attention}, {forms} closed forms")
        return self

    def ours(self, strategy: Any, precision: Any) -> Callable[[], None]:
        """The step of the trainer."""
        self.method.strategy = strategy
        step, scored = MetaStep(self.method, precision), self.batch.labels != -100

        def run() -> None:
            self.method.zero_grad()
            step(self.batch, self.write_steps, scored, False)[0].backward()

        return run

    def naive(self) -> Callable[[], None]:
        """PyTorch's own double backward through an unrolled descent."""
        method, batch = self.method, self.batch
        model = method.backbone.model

        def run() -> None:
            method.zero_grad()
            token = _one_sequence_a_row.set(True)  # as ours: the search for packed sequences would wait for the device
            with method.backbone.eager_attention():
                loss, _ = naive.meta_loss(
                    model,
                    method.write_head or model.get_output_embeddings(),
                    method.initial_memory,
                    method.options.inner_lr,
                    self.write_steps,
                    batch.context.ids,
                    batch.queries.ids,
                    batch.labels,
                )
                loss.backward()
            _one_sequence_a_row.reset(token)

        return run


def steps(
    setting: Callable[[], Setting], ways: Ways, *, against_naive: bool = False, profile: bool = False
) -> list[Row]:
    """Milliseconds and GB of each way; with the naive unroll in each precision beside it, and its share of that."""
    made, rows, base = setting(), list[Row](), dict[Any, Row]()
    contexts = len(made.batch.context)
    if against_naive:
        for precision in dict.fromkeys(precision for _, precision in ways):
            base[precision] = _measured(made.naive(), precision, contexts)
            rows.append({"setting": made.name, "variant": "naive", "precision": precision} | base[precision])
    for strategy, precision in ways:
        run = made.ours(strategy, precision)
        found = _measured(run, precision, contexts)
        naively = base.get(precision, {})
        if "ms_per_context" in found and "ms_per_context" in naively:
            found["time_ratio"] = found["ms_per_context"] / naively["ms_per_context"]
            found["memory_ratio"] = found["peak_gb"] / max(naively["peak_gb"], 1e-9)
        rows.append({"setting": made.name, "variant": strategy, "precision": precision} | found)
        if profile:
            try:
                _profile(run, precision)
            except RuntimeError as error:
                say(f"    no profile: {error}")
    return rows


def _measured(run: Callable[[], None], precision: Any, contexts: int) -> Row:
    """Seconds of the first run, which may compile; milliseconds a context; GB. Or why not."""
    try:
        with products(precision):
            started = time.perf_counter()
            run()
            synchronize()
            first = time.perf_counter() - started
            took, memory = timed(run)
    except RuntimeError as error:
        return {"error": str(error).splitlines()[0][:200]}
    found = {"first_s": round(first, 2), "ms_per_context": 1e3 * took / contexts, "peak_gb": memory}
    say(f"    {precision}: {found}")
    return found


def _profile(run: Callable[[], None], precision: Any) -> None:
    """Print what the time of a step goes to."""
    with products(precision), torch.profiler.profile() as recorded:
        run()
        synchronize()
    averages = recorded.key_averages()
    key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    launches = sum(event.count for event in averages if event.key in ("cudaLaunchKernel", "cuLaunchKernelEx"))
    say(f"    {launches} launches")
    for event in sorted(averages, key=lambda event: -getattr(event, key))[:14]:
        say(f"      {getattr(event, key) / 1e3:9.2f} ms {event.count:6d} x {event.key[:90]}")


def reading(queries: tuple[int, ...] = (1, 64, 512)) -> list[Row]:
    """Queries per second, answered by greedy generation: from memory, and from the kept KV-cache of the whole text."""
    rows = []
    for name, method, whole, context, query, length in _readers():
        for kind, reader in (("memory", method), ("KV-cache kept", whole)):
            state = reader.write(context, 1).memory
            for count in queries:
                took, memory = timed(_asking(reader, state, [query] * count, length))
                row = {"model": name, "context_tokens": context.ids.shape[1], "queries": count, "from": kind}
                rows.append(row | {"queries_per_second": count / took, "peak_gb": memory})
    return rows


def _asking(reader: Method, state: Any, queries: list[list[int]], length: int) -> Callable[[], Any]:
    rows = torch.zeros(len(queries), dtype=torch.long, device=device())
    options = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False, "eos_token_id": 2}
    return lambda: reader.generate(state, queries, rows, **options)


def _readers() -> Iterator[tuple[str, Method, Method, Tokens, list[int], int]]:
    """Model, ways to read, context, query, and tokens of an answer."""
    model = load("kv-96").to(device())
    model.method.eval()
    batch = model.task.batch("test", 0, 1)
    yield "kv-96", model.method, FullContext(model.method.backbone), batch.context.to(device()), batch.prompts()[0], 4
    torch.manual_seed(0)
    backbone = Backbone.from_config(SMOLLM2).to(device())
    method = GradMem(backbone, n_mem=32).to(device()).eval()
    ids: Tensor = torch.randint(SMOLLM2["vocab_size"], (1, 512))
    text = Tokens(ids, torch.ones_like(ids, dtype=torch.bool)).to(device())
    yield "SmolLM2-135M's shape", method, FullContext(backbone), text, list(range(100, 112)), 8
