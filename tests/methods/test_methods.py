"""What every method must do: each file in `gradmem/methods` is found here and goes through all of these tests."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

import gradmem
from cases import ALL, TEXT, build
from gradmem import GradmemError, Memory, MemoryModel
from gradmem.backbone import Backbone
from gradmem.batch import Tokens
from gradmem.cli.evaluation_tables import results_table
from gradmem.evaluation import evaluate
from gradmem.methods import Method
from gradmem.training.step import MetaStep
from helpers import distance, make_batch, random_tokens, real

TOLERANCE = 1e-4


@pytest.fixture(params=ALL, ids=lambda pair: f"{pair[0]}-{pair[1]}")
def model(request: pytest.FixtureRequest) -> MemoryModel:
    return build(*request.param)


@pytest.fixture
def method(model: MemoryModel) -> Method:
    return model.method


def write(method: Method, context: Tokens, steps: int | None = None) -> Memory:
    with torch.no_grad():
        return method.write(context, steps).memory


def read(method: Method, memory: Memory, queries: Tokens, rows: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return method.read(memory, queries, rows)


def close(got: Tensor, wanted: Tensor) -> bool:
    return distance(got, wanted) < TOLERANCE


def same(got: Memory, wanted: Memory) -> bool:
    """Every tensor has the same shape and, but for rounding, the same values."""
    return got.tensors.keys() == wanted.tensors.keys() and all(
        tensor.shape == got.tensors[name].shape and close(got.tensors[name].double(), tensor.double())
        for name, tensor in wanted.tensors.items()
    )


def alone(tokens: Tokens, row: int) -> Tokens:
    return Tokens.from_lists([real(tokens, row).tolist()])


# --- Write and read ---------------------------------------------------------------------------------------


def test_a_row_alone_is_a_row_of_a_padded_batch(method: Method) -> None:
    """For memories, what is read from them, and their bytes."""
    batch = make_batch()
    memory = write(method, batch.context)
    logits = read(method, memory, batch.queries, batch.rows)
    assert logits.shape[:2] == (5, batch.queries.ids.shape[1] + 1)
    assert logits.isfinite().all()
    own = [write(method, alone(batch.context, row)) for row in range(3)]
    for row, single in enumerate(own):
        assert same(memory[row], single)
        assert memory[row].nbytes == single.nbytes
    assert memory.nbytes == sum(single.nbytes for single in own)
    for query, row in enumerate(batch.rows.tolist()):
        ids = alone(batch.queries, query)
        wanted = read(method, own[row], ids)[0]
        assert close(logits[query, : len(wanted)], wanted)
    assert not close(logits[0, 1:5], read(method, own[0], alone(batch.queries, 0))[0, 1:]), "memories should differ"


def test_pads_say_nothing(method: Method) -> None:
    batch = make_batch()
    other = Tokens(batch.context.ids.where(batch.context.mask, 7), batch.context.mask)
    assert same(write(method, other), write(method, batch.context))


def test_rows_in_another_order(method: Method) -> None:
    context, queries, order = random_tokens([7, 5, 8, 6]), random_tokens([4, 6, 3, 5], 1), torch.tensor([2, 0, 3, 1])
    wanted = read(method, write(method, context), queries)
    got = read(method, write(method, context[order]), queries[order])
    assert close(got[:, 1:5], wanted[order][:, 1:5])


def test_read_targets_is_read(method: Method) -> None:
    batch = make_batch()
    memory = write(method, batch.context)
    targets = method.read_targets(memory, batch)
    assert close(targets, method.read(memory, batch.queries, batch.rows)[:, :-1][batch.labels != -100])


def test_a_prefix_serves_many_reads(method: Method) -> None:
    batch = make_batch()
    with torch.no_grad():
        prefix = method.prefix(write(method, batch.context))
        first, again = (method.read_hidden(prefix.select(batch.rows), batch.queries) for _ in range(2))
    assert torch.equal(first, again)


def test_joined_prefixes_are_those_of_joined_memories(method: Method) -> None:
    """Memories of contexts of different lengths, one of them unwritten; some generate, all are read."""
    batch = make_batch()
    parts = [write(method, alone(batch.context, row)) for row in range(2)] + [write(method, alone(batch.context, 2), 0)]
    with torch.no_grad():
        first, *others = [method.prefix(part) for part in parts]
        joined = first.join(others)
        assert joined.nbytes >= first.nbytes + sum(other.nbytes for other in others)
        queries = batch.queries[:3]
        hidden = method.read_hidden(joined.select(torch.arange(3)), queries)
    for row, part in enumerate(parts):
        ids = alone(queries, row)
        with torch.no_grad():
            wanted = method.read_hidden(method.prefix(part), ids)[0]
        assert close(hidden[row, 1 : len(wanted)], wanted[1:])
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "eos_token_id": 2}
    got = method.generate(joined, QUERIES, torch.tensor(ROWS), **settings)
    for query, row, answer in zip(QUERIES, ROWS, got, strict=True):
        assert answer == method.generate(parts[row], [query], **settings)[0]


def test_unwritten_memory_knows_nothing(method: Method) -> None:
    queries = random_tokens([4, 6], 1)
    one, two = (write(method, random_tokens([7, 5], seed), 0) for seed in (0, 2))
    assert same(one, two)
    assert read(method, one, queries).isfinite().all()
    assert not close(
        read(method, one, queries)[0, 1:], read(method, write(method, random_tokens([7, 5])), queries)[0, 1:]
    )


def test_trajectory(method: Method) -> None:
    context = random_tokens([5, 4])  # one chunk, where a method writes in chunks
    with torch.no_grad():
        first, second, *_ = method.trajectory(context, 2)
    assert (first.taken.tolist(), second.taken.tolist()) == ([0, 0], [1, 1])
    assert same(first.memory, write(method, context, 0))
    assert same(second.memory, write(method, context, 1))


def test_after_some_steps(method: Method) -> None:
    context = random_tokens([7, 5])
    with torch.no_grad():
        found = list(method.at_steps(context, [method.write_steps, 0]))
    assert [number for number, _ in found] == [0, method.write_steps]
    assert all(same(written.memory, write(method, context, number)) for number, written in found)


def test_token_losses(method: Method) -> None:
    context = random_tokens([7, 5])
    with torch.no_grad():
        losses = method.token_losses(write(method, context), context)
    assert losses.shape == context.ids.shape
    assert losses.isfinite().all()
    assert (losses[context.mask] > 0).all()
    assert not losses[~context.mask].any()


def test_reconstruct(method: Method) -> None:
    """Every token is the likeliest after those before it, by the losses of the receipt."""
    memory = write(method, random_tokens([5, 4]))  # one chunk, where a method writes in chunks
    found = method.reconstruct(memory, [3, 2])
    assert list(map(len, found)) == [3, 2]
    vocabulary = method.backbone.head.weight.shape[0]
    for row, ids in enumerate(found):
        for place, token in enumerate(ids):
            each = Tokens.from_lists([[*ids[:place], other, 0] for other in range(vocabulary)])
            with torch.no_grad():
                losses = method.token_losses(memory.select([row] * vocabulary), each)[:, place]
            assert losses[token] <= losses.min() + 1e-5


def test_refused(method: Method) -> None:
    with pytest.raises(GradmemError, match="at least 0"):
        method.write(random_tokens([3]), -1)
    with pytest.raises(GradmemError, match="a context is empty"):
        method.write(Tokens.from_lists([[1], []]))
    memory = write(method, random_tokens([3]))
    method.check(memory, "it")
    for name, tensor in memory.tensors.items():
        with pytest.raises(GradmemError, match="it holds"):
            method.check(Memory({key: t for key, t in memory.tensors.items() if key != name}), "it")
        if tensor.ndim > 1:
            with pytest.raises(GradmemError, match="it holds"):
                method.check(Memory({**memory.tensors, name: tensor[..., 1:]}), "it")


# --- Generate ---------------------------------------------------------------------------------------------

QUERIES, ROWS = [[3, 1, 4, 1, 5], [9], [2, 6], [9]], [2, 0, 0, 1]


def next_logits(model: MemoryModel, memory: Memory, query: list[int]) -> Tensor:
    logits = read(model.method, memory, Tokens.from_lists([query]))[0, -1]
    logits[model.task.end_id] = -torch.inf
    return logits


def test_generate_is_greedy_reading(model: MemoryModel) -> None:
    """Queries of different lengths, several for one memory."""
    memory = write(model.method, make_batch().context)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "eos_token_id": 2}
    got = model.method.generate(memory, QUERIES, torch.tensor(ROWS), **settings)
    for query, row, answer in zip(QUERIES, ROWS, got, strict=True):
        ids = list(query)
        for _ in range(5):
            ids.append(int(next_logits(model, memory[row], ids).argmax()))
        assert answer == ids[len(query) :]
    assert len(set(map(tuple, got))) > 2, "the test should see different answers"


def test_beams_find_the_best(model: MemoryModel) -> None:
    """As many beams as there are tokens miss no sequence of two."""
    memory, vocabulary = write(model.method, make_batch().context), len(model.task.tokenizer)
    settings = {"max_new_tokens": 2, "min_new_tokens": 2, "num_beams": vocabulary, "eos_token_id": model.task.end_id}
    got = model.method.generate(memory, QUERIES, torch.tensor(ROWS), num_return_sequences=2, **settings)
    assert len(got) == 2 * len(QUERIES)
    end = model.task.end_id
    for i, (query, row) in enumerate(zip(QUERIES, ROWS, strict=True)):
        both = Tokens.from_lists([[*query, token] for token in range(vocabulary)])
        logits = read(model.method, memory.select([row] * vocabulary), both)[:, -2:].log_softmax(-1)
        logits[..., end] = -torch.inf
        best = (logits[0, 0][:, None] + logits[:, 1]).flatten().topk(2).indices.tolist()
        assert got[2 * i : 2 * i + 2] == [[index // vocabulary, index % vocabulary] for index in best]


# --- Files and bytes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 0.0), ("float16", 1e-3), ("int8", 1e-2)])
def test_memory_file(
    model: MemoryModel, tmp_path: Path, precision: Literal["float32", "float16", "int8"], tolerance: float
) -> None:
    memory = model.write([TEXT, "a7:Qz"])
    opened = model.open(memory.save(tmp_path / "m.safetensors", precision))
    assert opened.receipts == memory.receipts
    assert opened.tensors.keys() == memory.tensors.keys()
    for name, wanted in memory.tensors.items():
        got, allowed = opened.tensors[name], tolerance * float(wanted.abs().max())
        assert got.dtype == wanted.dtype
        assert float((got - wanted).abs().max()) <= (allowed if wanted.is_floating_point() else 0)
        assert torch.equal(got, memory.rounded(precision).tensors[name])


def test_bytes_are_those_of_the_file(model: MemoryModel, tmp_path: Path) -> None:
    """Of one memory out of a padded batch: padding is neither counted nor saved."""
    memory = model.write([TEXT, "a7:Qz"])
    for row in (0, 1):
        data = memory[row].save(tmp_path / "m.safetensors").read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        json.loads(data[8 : 8 + size])
        assert memory[row].nbytes == len(data) - 8 - size


def test_checkpoint(model: MemoryModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "checkpoint")
    loaded = gradmem.load(tmp_path / "checkpoint")
    memory = model.write(TEXT)
    opened = loaded.open(memory.save(tmp_path / "m.safetensors"))
    assert opened.ask(["a7", "zz"], max_new_tokens=8) == memory.ask(["a7", "zz"], max_new_tokens=8)
    assert all(torch.equal(tensor, memory.tensors[name]) for name, tensor in loaded.write(TEXT).tensors.items())


# --- Text, training, evaluation ---------------------------------------------------------------------------


def test_write_and_ask(model: MemoryModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of different lengths, written in parts, answer as each does alone."""
    texts, queries = ["a7:Qz", TEXT, "11:22\n33:44"], [["a7"], ["k2", "zz"], []]
    monkeypatch.setattr(Backbone, "tokens_at_once", 50)
    memory = model.write(texts)
    single = [model.write(text) for text in texts]
    assert all(same(memory[row], one) for row, one in enumerate(single))
    answers = memory.ask(queries, max_new_tokens=8)
    assert answers[:2] == [one.ask(asked, max_new_tokens=8) for one, asked in zip(single, queries[:2], strict=False)]
    assert answers[2] == []
    for receipt, one in zip(memory.receipts, single, strict=True):
        assert receipt.steps == model.method.write_steps
        assert receipt.losses == pytest.approx(one.receipts[0].losses, abs=1e-4)
        assert receipt.context_tokens == len(receipt.token_losses)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_step(method: Method, precision: Literal["fp32", "bf16"]) -> None:
    """Every parameter learns, also from what only the context says."""
    if not any(parameter.requires_grad for parameter in method.parameters()):
        pytest.skip("this method has nothing to train")
    batch = make_batch()
    loss, write_loss, _ = MetaStep(method.train(), precision)(batch, method.write_steps, batch.labels != -100)
    (loss + 0.1 * write_loss).backward()
    assert loss.isfinite()
    for name, parameter in ((n, p) for n, p in method.named_parameters() if p.requires_grad):
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    # The last token of a context may be one that is predicted only.
    told = set(batch.context.ids[:, :-1][batch.context.mask[:, 1:]].tolist())
    asked = set(batch.queries.ids[batch.queries.mask].tolist())
    assert method.backbone.model.get_input_embeddings().weight.grad[sorted(told - asked)].any(1).all()
    method.zero_grad()
    method.eval()


def test_evaluate(model: MemoryModel) -> None:
    results = evaluate(model, [0, 1], samples=3)
    assert [result.steps for result in results] == [0, 1]
    context = model.task.batch("test", 0, 1, 1).context
    assert results[1].bytes == write(model.method, context, 1).nbytes
    caption = str(results_table(results).caption)
    assert f"{results[1].bytes} bytes" in caption
    assert ("vectors" in caption) == bool(model.method.n_mem)
