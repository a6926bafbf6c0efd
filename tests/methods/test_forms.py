"""Memories of keys and values and of low-rank matrices, against a naive reference in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gradmem
from gradmem import GradmemError
from gradmem.batch import Batch, Tokens
from gradmem.evaluation import evaluate
from gradmem.inner import Strategy
from gradmem.lora import add_lora
from gradmem.memory import LENGTHS
from gradmem.methods import GradMem
from helpers import (
    TOLERANCE,
    assert_same_gradients,
    check_slopes,
    distance,
    gradients,
    make_batch,
    make_gradmem,
    make_later_batch,
    outer_loss,
    random_tokens,
    real,
    refused_in_one_line,
    saved_and_opened,
)
from naive_forms import NaiveForm, NaiveKeysValues, NaiveLowRank

SLOTS: dict[str, Any] = {"memory": "keys_values", "inner_lr": 3.0}
MATRICES: dict[str, Any] = {"memory": "lora", "lora_rank": 2, "lora_alpha": 3.0, "inner_lr": 0.1}
INSIDE = MATRICES | {"lora_placement": "target_modules"}
LEARNED = {"learn_inner_lr": True, "learn_momentum": True, "write_steps": 3, "last_k": 1}
PUBLISHED = {"begin": False, "inner_optimizer": "published_adam", "write_steps": 3, "clip_value": 0.01}
CASES: dict[str, dict[str, Any]] = {
    "slots": SLOTS,
    "slots_first": SLOTS | {"order": "first", "write_head": "copy"},
    "slots_all": SLOTS | LEARNED | {"projection": "proj", "write_head": "random", "clip_norm": 0.02},
    "slots_unbegun": SLOTS | {"begin": False, "clip_value": 0.01, "order": "none"},
    "slots_adam": SLOTS | PUBLISHED | {"inner_lr": 0.05},
    "layers": MATRICES,
    "layers_last": MATRICES | LEARNED | {"lora_layers": "last_1", "write_head": "random", "clip_norm": 0.02},
    "layers_unbegun": MATRICES | {"begin": False, "order": "first"},
    "inside": INSIDE | {"inner_optimizer": "adam", "inner_lr": 0.02},
    "inside_some": INSIDE | {"lora_layers": 0, "lora_targets": "q_proj, down_proj", "begin": False},
    "inside_adam": INSIDE | PUBLISHED | {"inner_lr": 0.02, "order": "none"},
}
GPT2 = {"slots_all", "inside"}
"""Also on GPT-2: learned positions, and layers that are called otherwise."""


def build(name: str, kind: str = "llama", **options: Any) -> GradMem:
    plain = {"n_mem": 8} if CASES[name]["memory"] == "lora" else {}
    return make_gradmem(kind, **plain | CASES[name] | options)


def naive(method: GradMem, **changed: Any) -> NaiveForm:
    own = {
        name: getattr(method.options, name) for name in NaiveForm.__dataclass_fields__ if name in vars(method.options)
    }
    options = vars(method.options)
    kind = NaiveKeysValues if options["memory"] == "keys_values" else NaiveLowRank
    return kind(method, **own | changed, options=options)


def batch_for(method: GradMem) -> Batch:
    """Where nothing predicts the first token of a query, it is no target."""
    return make_batch() if method.options.begin else make_later_batch()


def loss_of(method: GradMem, batch: Batch) -> tuple[Tensor, Any]:
    return outer_loss_without_first(method, batch) if not method.options.begin else outer_loss(method, batch, 0.5)


def outer_loss_without_first(method: GradMem, batch: Batch) -> tuple[Tensor, Any]:
    written = method.write(batch.context)
    logits = method.read(written.memory, batch.queries, batch.rows)[:, 1:-1]
    loss = F.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten())
    return loss + 0.5 * written.losses[-1].mean(), written.memory


@pytest.mark.parametrize(
    ("name", "kind", "strategy"),
    [(name, "llama", "recompute") for name in CASES]
    + [(name, "gpt2", "recompute") for name in CASES if name in GPT2]
    + [("slots_all", "llama", "unroll"), ("layers_last", "llama", "unroll")],
)
def test_equals_naive(name: str, kind: str, strategy: Strategy) -> None:
    """Loss, everything written, and all gradients."""
    method = build(name, kind)
    method.strategy, batch = strategy, batch_for(method)
    loss, memory = loss_of(method, batch)
    wanted_loss, wanted = naive(method).loss(batch, auxiliary=0.5)
    assert loss.item() == pytest.approx(wanted_loss.item(), rel=TOLERANCE)
    assert memory.tensors.keys() == wanted[0].keys()
    for row, tensors in enumerate(wanted):
        for key, tensor in tensors.items():
            assert distance(memory.tensors[key][row], tensor) < TOLERANCE, (row, key)
    grads = gradients(loss, method)
    assert_same_gradients(grads, gradients(wanted_loss, method))
    learns = method.options.order != "none"
    assert all(grad.any() == learns for key, grad in grads.items() if key.startswith("form.initial"))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("slots", {"projection": "proj", "clip_norm": 0.02}),
        ("layers", {"learn_inner_lr": True}),
        ("inside", {"write_lora": 2, "read_lora": 2, "lora_layers": 1, "lora_targets": "q_proj,down_proj"}),
        ("slots", {"chunk_size": 3, "chunk_mode": "growing"}),
        ("layers", {"chunk_size": 3, "chunk_mode": "parallel"}),
        ("slots", {"write_objective": "energy", "chunk_size": 3, "chunk_mode": "joint"}),
    ],
    ids=str,
)
def test_the_meta_gradient_is_the_derivative(name: str, options: dict[str, Any]) -> None:
    """Of write, read and auxiliary loss, by finite differences, for what the form adds."""
    method, batch = build(name, **options), make_batch()
    added = {
        key
        for key, _ in method.named_parameters()
        if not key.startswith("backbone.") or "1.self_attn.q_proj.lora" in key
    }
    added -= {"energy.head.2.bias"}  # a constant, which nothing depends on
    check_slopes(
        method, lambda: outer_loss(method, batch, auxiliary=0.5)[0], added, h=3e-7 if "read_lora" in options else 2e-6
    )


@pytest.mark.parametrize("name", ["slots", "layers", "inside_some", "slots_unbegun"])
def test_reading_and_generating_after_a_prefix(name: str) -> None:
    """Greedy answers to queries of different lengths, several to one memory, without a cache."""
    method = build(name)
    queries, rows = [[3, 1, 4, 1, 5], [9], [2, 6], [9]], [2, 0, 0, 1]
    with torch.no_grad():
        memory = method.write(make_batch().context).memory
        got = method.generate(memory, queries, torch.tensor(rows), max_new_tokens=4, do_sample=False)
        beams = method.generate(memory[1], [[9]], max_new_tokens=3, num_beams=3)
        for query, row, answer in zip(queries, rows, got, strict=True):
            own, ids = memory[row].tensors, list(query)
            for _ in range(4):
                ids.append(int(naive(method).read({n: t[0] for n, t in own.items()}, torch.tensor(ids))[-1].argmax()))
            assert answer == ids[len(query) :]
    assert len(set(map(tuple, got))) > 2, "the test should see different answers"
    assert len(beams[0]) == 3


@pytest.mark.parametrize("name", ["slots_all", "layers", "inside_some"])
def test_memories_of_chunks_are_read_together(name: str) -> None:
    """Growing ones start where the one before ended; slots stand one after the other, changes of weights add up."""
    method, batch = build(name, chunk_size=3, chunk_mode="growing"), batch_for(build(name))
    reference, slots = naive(method), method.options.memory == "keys_values"
    memory = method.write(batch.context).memory
    assert memory.tensors[LENGTHS].tolist() == [3, 2, 3]
    logits = method.read(memory, batch.queries, batch.rows)
    chunks = []
    for row in range(3):
        states = [reference.start()]
        for chunk in real(batch.context, row).split(3):
            states.append(reference.write(chunk, states[-1])[0])
        chunks.append(states[1:])
        for number, state in enumerate(states[1:]):
            for key, tensor in state.items():
                assert distance(memory.tensors[key][row, number], tensor) < TOLERANCE
    for query, row in enumerate(batch.rows.tolist()):
        side = {key: 1 if slots or key.endswith("_A") else 0 for key in chunks[row][0]}
        whole = {key: torch.cat([own[key] for own in chunks[row]], side[key]) for key in side}
        ids = real(batch.queries, query)
        wanted = reference.read(whole, ids)
        first = 0 if method.options.begin else 1
        assert distance(logits[query, first : len(ids) + 1], wanted[first:]) < TOLERANCE
    with torch.no_grad():
        added = [state.memory for state in method.extend(memory, batch.context[:3], 2)][-1]
        both = method.merge(memory, added)
    assert both.tensors[LENGTHS].tolist() == [6, 4, 6]
    last = {key: tensor[1, 1] for key, tensor in memory.tensors.items() if key != LENGTHS}
    wanted = reference.write(real(batch.context, 1)[:3], last)[0]
    if not method.options.learn_inner_lr:
        assert all(distance(both.tensors[key][1, 2], wanted[key]) < TOLERANCE for key in wanted)


def test_parallel_chunks_count_alike() -> None:
    """As published: the mean of the chunks' mean losses, divided by the number of chunks once more."""
    method, batch = build("slots", chunk_size=3, chunk_mode="parallel", write_steps=1), make_batch()
    reference = naive(method)
    memory = method.write(batch.context).memory
    for row in range(3):
        start = {key: tensor.detach().requires_grad_() for key, tensor in reference.start().items()}
        losses = [reference.context_loss(start, chunk) for chunk in real(batch.context, row).split(3)]
        grads = torch.autograd.grad(sum(losses), list(start.values()))
        for (key, tensor), grad in zip(start.items(), grads, strict=True):
            assert distance(memory.tensors[key][row], tensor - 3.0 * grad / 3**2) < TOLERANCE


@pytest.mark.parametrize("name", ["slots_unbegun", "layers_unbegun"])
def test_a_single_token_that_nothing_predicts(name: str) -> None:
    method = build(name)
    written = method.write(Tokens.from_lists([[5], [5]]))
    assert not written.losses.any()
    start = naive(method).start()
    assert all(torch.equal(tensor[1], start[key]) for key, tensor in written.memory.tensors.items())


def test_the_vector_before_the_tokens_starts_as_that_of_the_model() -> None:
    torch.manual_seed(0)
    backbone = make_gradmem("llama", config={"bos_token_id": 7}).backbone
    method = GradMem(backbone, memory="keys_values")
    assert torch.equal(method.form.begin[0], backbone.model.get_input_embeddings().weight[7])
    assert method.max_context == 40 - 8 - 1
    assert method.n_mem == 0


def test_matrices_start_without_effect() -> None:
    """READ from a new memory is the model alone, and the first step moves B only."""
    method, batch = GradMem(build("slots").backbone, **MATRICES), make_batch()
    first = next(iter(method.trajectory(batch.context, 1))).memory
    plain = method.backbone.head(method.backbone.hidden(method.form.begin[None].expand(5, -1, -1)))
    assert distance(method.read(first, batch.queries, batch.rows)[:, 0], plain[:, 0]) < TOLERANCE
    written = method.write(batch.context, 1).memory.tensors
    assert torch.equal(written["layer0_A"], first.tensors["layer0_A"])
    assert (written["layer0_B"] != 0).any()
    assert float(method.form.initial["layer0_A"].detach().abs().max()) <= 2**-0.5


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_places_are_the_same_on_a_backbone_with_lora(kind: str) -> None:
    backbone = make_gradmem(kind).backbone
    plain = GradMem(backbone, **INSIDE).form.places
    add_lora(backbone.model, 2)
    assert GradMem(backbone, **INSIDE).form.places == plain
    assert len(plain) == {"llama": 14, "gpt2": 8}[kind]


@pytest.mark.parametrize("name", ["slots_all", "inside"])
def test_prefixes_of_readers_with_adapters_are_joined(name: str) -> None:
    method = build(name, read_lora=2, chunk_size=3, chunk_mode="independent")
    context, queries = random_tokens([7, 2]), random_tokens([4, 3], 1)
    with torch.no_grad():
        memory = method.write(context).memory
        wanted = method.read(memory, queries)
        first, second = (method.prefix(memory[row]) for row in (1, 0))
        got = method.backbone.head(method.read_hidden(first.join([second]).select(torch.tensor([1, 0])), queries))
    assert (
        distance(
            got[queries.mask.new_ones(2, 5) & F.pad(queries.mask, (1, 0), value=True)],
            wanted[F.pad(queries.mask, (1, 0), value=True)],
        )
        < TOLERANCE
    )


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"lora_rank": 4}, "lora_rank is not used with `memory: vectors`: leave it out"),
        ({"begin": False}, "begin is not used with `memory: vectors`"),
        ({"memory": "keys_values", "n_ctrl": 1}, "n_ctrl is not used with `memory: keys_values`"),
        ({"memory": "keys_values", "projection": "per_sample"}, "no projection `per_sample`: take `proj` or `none`"),
        ({"memory": "lora", "projection": "proj"}, "projection is not used with `memory: lora`"),
        ({"memory": "lora", "n_mem": 3}, "n_mem is not used with `memory: lora`"),
        ({"memory": "lora", "lora_rank": 0}, "lora_rank must be at least 1, not 0"),
        ({"memory": "lora", "lora_alpha": 0.0}, "lora_alpha must be positive, not 0.0"),
        ({"memory": "lora", "lora_layers": "last_3"}, "lora_layers must be all, last_N or numbers from 0 to 1"),
        ({"memory": "lora", "lora_layers": "0,2"}, "such as 0,1, not '0,2'"),
        ({"memory": "lora", "lora_layers": -1}, "lora_layers must be all"),
        ({"memory": "lora", "lora_targets": "q_proj"}, "lora_targets is used with `lora_placement: target_modules`"),
        (INSIDE | {"lora_targets": "q_proj,k"}, "no linear module is called 'k'; there are q_proj, k_proj, v_proj"),
        ({"memory": "cache"}, "memory must be vectors, keys_values or lora"),
        ({"write_objective": "energy", "gauss_newton_after": 0}, "write_objective must be reconstruction with"),
    ],
    ids=str,
)
def test_bad_options_get_one_line(options: dict[str, Any], wanted: str) -> None:
    with refused_in_one_line(wanted):
        GradMem(make_gradmem("llama").backbone, **options)


# --- Models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["keys_values", "lora"])
def test_a_saved_model_writes_saves_and_answers(name: str, tmp_path: Path) -> None:
    model, memory = saved_and_opened({"name": "gradmem", "memory": name, "write_steps": 2}, tmp_path)
    assert len(memory.receipts[0].losses) == 3
    with pytest.raises(GradmemError, match="but this method writes"):
        model.method.check(gradmem.Memory({"memory": torch.zeros(1, 8, 16)}), "the file")
    (result,) = evaluate(model, samples=2)
    assert 0 <= result.unwritten <= 1
    assert 0 <= result.swapped <= 1
    assert (result.n_mem, result.bytes > 0) == (0, True)
