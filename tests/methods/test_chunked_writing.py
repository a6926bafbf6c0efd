"""Contexts in chunks: against a reference that writes them in a Python loop, and where they are cut."""

from __future__ import annotations

import dataclasses
import re
import weakref
from itertools import chain
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gradmem.backbone import Backbone
from gradmem.batch import Tokens
from gradmem.methods import RMT, GradMem
from gradmem.methods.base.chunks import Chunks
from gradmem.model.build import build_task
from gradmem.training.plan import AUTO
from helpers import (
    MODES,
    SIZE,
    TOLERANCE,
    assert_same_gradients,
    check_slopes,
    chunked,
    distance,
    gradients,
    make_batch,
    make_gradmem,
    make_method,
    outer_loss,
    random_tokens,
    real,
)
from naive import EVERYTHING, OPTIONS, Naive
from naive_rmt import naive_read, naive_write

CASES = ["second", "first", "none", "last_k", "one_vector", "adam", "everything", "everything_last_k"]


@dataclasses.dataclass
class NaiveChunks(Naive):
    """One chunk after the other; independent ones are stacked, and each is projected on its own in READ.

    Of joint ones, every step descends the mean loss of all tokens, each chunk read as if it were alone.
    """

    size: int = SIZE
    mode: str = "independent"

    def write(
        self, context: Tensor, written: dict[str, Tensor] | None = None
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        if self.mode == "joint":
            return super().write(context, written)
        memories, losses = [], []
        for chunk in context.split(self.size):
            before = memories[-1] if memories and self.mode == "sequential" else None
            memory, own = super().write(chunk, before)
            memories.append(memory)
            losses.append([loss * len(chunk) / len(context) for loss in own])
        total = [sum(step) for step in zip(*losses, strict=True)]
        if self.mode == "sequential":
            return memories[-1], total
        return {name: torch.stack([memory[name] for memory in memories]) for name in memory}, total

    def context_loss(self, written: dict[str, Tensor], context: Tensor) -> Tensor:
        if self.mode != "joint":
            return super().context_loss(written, context)
        parts = context.split(self.size)
        return sum(super(NaiveChunks, self).context_loss(written, part) * len(part) for part in parts) / len(context)

    def vectors(self, written: dict[str, Tensor]) -> Tensor:
        if written["memory"].dim() == 2:
            return super().vectors(written)
        each = [{name: tensor[i] for name, tensor in written.items()} for i in range(len(written["memory"]))]
        return torch.cat([super(NaiveChunks, self).vectors(one) for one in each])


def naive(method: GradMem, mode: str, **options: Any) -> NaiveChunks:
    return NaiveChunks(method, **{"inner_lr": 0.3, "write_steps": 2} | options, mode=mode)


# --- The naive reference ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("kind", "name"), [("gpt2", name) for name in CASES] + [("llama", "everything"), ("qwen2", "second")]
)
def test_equals_naive(kind: str, name: str, mode: str) -> None:
    """Loss, everything written, and all gradients, of rows of different numbers of chunks, by every strategy."""
    options, batch = OPTIONS[name], make_batch()
    reference = chunked(mode, kind, **options)
    wanted_loss, wanted = naive(reference, mode, **options).loss(batch, auxiliary=0.5)
    wanted_grads = gradients(wanted_loss, reference)
    for strategy in AUTO:
        method = chunked(mode, kind, **options)
        method.strategy = strategy
        loss, memory = outer_loss(method, batch, auxiliary=0.5)
        assert loss.item() == pytest.approx(wanted_loss.item(), rel=TOLERANCE), strategy
        for row, tensors in enumerate(wanted):
            for key, tensor in tensors.items():
                assert distance(memory[row].tensors[key][0], tensor) < TOLERANCE, (strategy, row, key)
        if mode == "independent":
            assert memory.tensors["lengths"].tolist() == [3, 2, 3]
            assert not memory.tensors["memory"][1, 2].any(), "padded with zeros"
        assert_same_gradients(gradients(loss, method), wanted_grads)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "options",
    [{}, EVERYTHING, {"inner_optimizer": "adam", "inner_lr": 0.05}],
    ids=["plain", "everything", "adam"],
)
def test_the_meta_gradient_is_the_derivative(mode: str, options: dict[str, Any]) -> None:
    """Of writing all chunks, reading and the auxiliary loss, for every parameter, by finite differences.

    One block: every parameter takes two whole passes, and chunks know nothing of blocks.
    """
    method, batch = chunked(mode, config={"n_layer": 1}, **options), make_batch()
    method.strategy = "recompute"
    check_slopes(method, lambda: outer_loss(method, batch, auxiliary=0.5)[0], h=2e-6)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_rmt_is_segment_recurrence(kind: str) -> None:
    """Each segment is written from the memory of the one before it; gradients pass through all."""
    options = {"n_mem": 3, "write_steps": 2, "n_ctrl": 1, "projection": "proj_rw", "residual": True}
    options |= {"write_head": "none", "reconstruction": False}
    method, batch = make_method(RMT, kind, **options, chunk_size=SIZE), make_batch()
    batch.labels[:, 0] = -100

    class At:
        """The method, with another memory to start from."""

        def __init__(self, memory: Tensor) -> None:
            self.initial_memory = memory

        def __getattr__(self, name: str) -> Any:
            return getattr(method, name)

    rows = []
    for row in range(len(batch.context)):
        memory = method.initial_memory
        for chunk in real(batch.context, row).split(SIZE):
            memory = naive_write(At(memory), options, Tokens.from_lists([chunk.tolist()]))[0][0]
        rows.append(memory)
    logits = naive_read(method, options, torch.stack(rows)[batch.rows], batch.queries)
    wanted = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
    written = method.write(batch.context)
    assert distance(written.memory.tensors["memory"], torch.stack(rows)) < TOLERANCE
    got = method.read(written.memory, batch.queries, batch.rows)[:, :-1]
    loss = F.cross_entropy(got.flatten(0, 1), batch.labels.flatten())
    assert_same_gradients(gradients(loss, method), gradients(wanted, method))


# --- Writing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_one_chunk_is_the_whole(mode: str) -> None:
    whole, batch = make_gradmem(n_ctrl=1), make_batch()
    method = make_gradmem(n_ctrl=1, chunk_size=8, chunk_mode=mode)
    wanted, got = whole.write(batch.context), method.write(batch.context)
    assert distance(got.losses, wanted.losses) < TOLERANCE
    assert got.taken.tolist() == wanted.taken.tolist()
    assert distance(method.split_chunks(got.memory).tensors["memory"], wanted.memory.tensors["memory"]) < TOLERANCE
    logits = whole.read(wanted.memory, batch.queries, batch.rows)
    assert distance(method.read(got.memory, batch.queries, batch.rows), logits) < TOLERANCE
    assert method.chunk_lengths(batch.context) == [[7], [5], [8]]
    assert whole.chunk_lengths(batch.context) == [[], [], []]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_neighbours_and_order_change_nothing(mode: str, kind: str) -> None:
    """Rows of one to four chunks, each alone, and in another order."""
    method, lengths, order = chunked(mode, kind, n_ctrl=1), [4, 11, 2, 8], torch.tensor([2, 0, 3, 1])
    context, queries = random_tokens(lengths), random_tokens([4, 6, 3, 5], 1)
    written = method.write(context)
    logits, losses = method.read(written.memory, queries), method.token_losses(written.memory, context)
    shuffled = method.write(context[order])
    assert distance(shuffled.losses, written.losses[:, order]) < TOLERANCE
    for place, row in enumerate(order.tolist()):
        ids = Tokens.from_lists([real(context, row).tolist()])
        own = method.write(ids)
        for memory in (written.memory[row], shuffled.memory[place]):
            for name, tensor in own.memory.tensors.items():
                assert distance(memory.tensors[name].double(), tensor.double()) < TOLERANCE
            assert memory.nbytes == own.memory.nbytes
        assert distance(written.losses[:, row], own.losses[:, 0]) < TOLERANCE
        assert distance(losses[row, : lengths[row]], method.token_losses(own.memory, ids)[0]) < TOLERANCE
        asked = Tokens.from_lists([real(queries, row).tolist()])
        wanted = method.read(own.memory, asked)[0]
        assert distance(logits[row, : len(wanted)], wanted) < TOLERANCE
    assert not losses[~context.mask].any()


@pytest.mark.parametrize("mode", MODES)
def test_token_losses_are_those_of_the_chunks(mode: str) -> None:
    method, context = chunked(mode), random_tokens([8])
    memory = method.write(context).memory
    losses = method.token_losses(memory, context)[0]
    for number, chunk in enumerate(context.ids[0].split(SIZE)):
        own = {
            name: t[0, number] if mode == "independent" else t[0]
            for name, t in memory.tensors.items()
            if name[0] == "m"
        }
        logits = Naive(method, inner_lr=0.3, write_steps=2).forward("write", own, chunk)[:-1]
        wanted = F.cross_entropy(logits, chunk, reduction="none")
        assert distance(losses[number * SIZE :][: len(chunk)], wanted) < TOLERANCE


@pytest.mark.parametrize("mode", ["sequential", "independent"])
def test_until_stops_chunks_one_by_one(mode: str) -> None:
    method, context = chunked(mode), random_tokens([8, 5])
    with torch.no_grad():
        until = float(method.write(context, 3).losses[2].mean())
        written = method.write(context, 6, until=until)
        counts, whole = [], make_gradmem()
        for row in range(2):
            memory = whole._start(1)
            taken, places = [], []
            for chunk in real(context, row).split(SIZE):
                start = memory if mode == "sequential" else whole._start(1)
                *_, own = whole.trajectory_from(Tokens.from_lists([chunk.tolist()]), start, 6, until)
                memory = own.memory.tensors
                taken.append(int(own.taken))
                places.append(memory["memory"])
            wanted = torch.stack(places, 1) if mode == "independent" else memory["memory"]
            assert distance(written.memory[row].tensors["memory"], wanted) < TOLERANCE
            assert written.taken[row] == max(taken)
            counts += taken
    assert len(set(counts)) > 1


def test_until_stops_joint_chunks_together() -> None:
    """Each context when the mean loss of all its chunks is there, whatever its neighbours do."""
    method, context = chunked("joint"), random_tokens([8, 5])
    with torch.no_grad():
        until = float(method.write(context, 3).losses[2].mean())
        written = method.write(context, 6, until=until)
        for row in range(2):
            alone = Tokens.from_lists([real(context, row).tolist()])
            losses = method.write(alone, 6).losses[:, 0]
            taken = int((losses > until).long().cumprod(0).sum())
            assert written.taken[row] == taken
            wanted = method.write(alone, taken).memory.tensors["memory"]
            assert distance(written.memory[row].tensors["memory"], wanted) < TOLERANCE
    assert written.taken[0] != written.taken[1]


def test_parts_of_joint_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients the chunks of a long context are read in parts of so many tokens: with the same result."""
    method, context, sizes = chunked("joint", "llama"), random_tokens([14, 5]), []
    wanted = method.write(context, 3)
    losses = method._losses

    def counted(tensors: dict[str, Tensor], tokens: Tokens, embeds: Tensor) -> Tensor:
        sizes.append(len(tokens))
        return losses(tensors, tokens, embeds)

    method._losses = counted
    monkeypatch.setattr(Backbone, "tokens_at_once", 2 * SIZE)
    with torch.no_grad():
        got = method.write(context, 3)
    assert set(sizes) == {1, 2}
    assert distance(got.losses, wanted.losses) < TOLERANCE
    assert distance(got.memory.tensors["memory"], wanted.memory.tensors["memory"]) < TOLERANCE


@pytest.mark.parametrize("until", [None, 2.9])
def test_parts_of_a_long_context(until: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients a long context is written in parts of so many tokens: with the same result."""
    method, context = chunked("independent"), random_tokens([14, 5])
    wanted = method.write(context, 4, until=until)
    sizes = []
    walk = method.trajectory_from
    method.trajectory_from = lambda tokens, *rest: (sizes.append(len(tokens)), walk(tokens, *rest))[1]
    monkeypatch.setattr(Backbone, "tokens_at_once", 2 * SIZE)
    with torch.no_grad():
        got = method.write(context, 4, until=until)
    assert sizes == [2, 2, 2, 1]
    assert got.taken.tolist() == wanted.taken.tolist()
    assert distance(got.losses, wanted.losses) < TOLERANCE
    assert distance(got.memory.tensors["memory"], wanted.memory.tensors["memory"]) < TOLERANCE


def test_recompute_keeps_one_chunk_whatever_their_number() -> None:
    """What the graph of WRITE holds on to grows with sequential chunks by memories only."""
    sizes = []
    for chunks in (1, 2, 6):
        method, held = make_gradmem(chunk_size=6, chunk_mode="sequential"), []

        def pack(tensor: Tensor, held: list[weakref.ref[Tensor]] = held) -> Tensor:
            alive = tensor.view_as(tensor)
            held.append(weakref.ref(alive))
            return alive

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            written = method.write(random_tokens([6 * chunks] * 3))
        parameters = {parameter.shape for parameter in method.parameters()}
        alive = [ref() for ref in held]
        sizes.append(sum(t.numel() for t in alive if t is not None and t.shape not in parameters))
        memory = written.memory.tensors["memory"].numel()
    assert sizes[2] - sizes[1] < 4 * 30 * memory
    assert sizes[0] > 100 * memory


def test_steps_are_read_off_anew() -> None:
    """After so many steps on each chunk, in evaluation too."""
    method, context = chunked("sequential"), random_tokens([8, 5])
    for number, written in method.at_steps(context, [3, 0, 1]):
        assert distance(written.memory.tensors["memory"], method.write(context, number).memory.tensors["memory"]) == 0
        assert written.taken.tolist() == [number] * 2
    states = list(method.trajectory(context, 2))
    assert len(states) == 1 + 3 * 2
    assert [state.taken.tolist() for state in states[:3]] == [[0, 0], [1, 1], [2, 2]]


# --- Where chunks end -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_cuts(seed: int) -> None:
    """No token is lost; chunks end where they may, as late as possible, or are full."""
    generator = torch.Generator().manual_seed(seed)
    context, size = random_tokens([17, 9, 30, 1], seed), 5
    may_end = torch.rand(context.ids.shape, generator=generator) < 0.3
    chunks = Chunks.cut(context, size, may_end)
    for row in range(4):
        ids, ends, begin = real(context, row), may_end[row].tolist(), 0
        mine = [real(chunks.tokens, i).tolist() for i, owner in enumerate(chunks.rows.tolist()) if owner == row]
        assert list(chain(*mine)) == ids.tolist()
        assert chunks.counts[row] == len(mine)
        for chunk in mine:
            stop = begin + len(chunk)
            later = [e for e in range(begin + 1, min(begin + size, len(ids)) + 1) if e == len(ids) or ends[e - 1]]
            assert stop == (max(later) if later else begin + size)
            begin = stop
    values = torch.randn(chunks.tokens.ids.shape)
    back = chunks.rejoined(values, context)
    assert torch.equal(back[context.mask], values[chunks.tokens.mask])


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_pairs_stay_whole(noise: float) -> None:
    task = build_task({"name": "kv", "pairs": 8, "noise": noise})
    context = task.batch("test", 0, 4).context
    chunks = Chunks.cut(context, 30, task.may_end(context.ids))
    texts = [task.text(real(chunks.tokens, i).tolist()) for i in range(len(chunks.rows))]
    assert sum(len(re.findall("![^!|]{2}:[^!|]{2}!", text)) for text in texts) == 4 * 8
    assert all(text.count("!") % 2 == 0 for text in texts)
    assert texts[-1] != "|"
    assert max(map(len, texts)) <= 30


def test_statements_stay_whole() -> None:
    task = build_task({"name": "babi", "tasks": "qa2"})
    context = task.batch("train", 0, 4).context
    chunks = Chunks.cut(context, 40, task.may_end(context.ids))
    texts = [task.text(real(chunks.tokens, i).tolist()) for i in range(len(chunks.rows))]
    assert len(texts) > 4
    assert all(text.rstrip().endswith(".") for text in texts)
