"""The parts of compaction against plain formulas and the plain model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from families import tiny_model
from gradmem.backbone import Backbone
from gradmem.batch import Tokens
from gradmem.compaction import study as study_module
from gradmem.compaction.budget import enough, entries_of
from gradmem.compaction.fidelity import fidelity
from gradmem.compaction.match import match
from gradmem.compaction.questions import STOCK, check_language
from gradmem.compaction.select import compacted, select
from gradmem.compaction.text import Asked, Text, attention, continuations, whole_prefix
from gradmem.errors import GradmemError
from gradmem.lora import add_lora
from gradmem.memory import Memory
from gradmem.methods.compact import Compact
from stored import made as stored

STEP = 1e-3
"""Of finite differences: Llama's norms compute in float32, whatever the weights are."""
TEXT = [5, 9, 11, 7, 30, 12, 8, 3, 40, 41, 4, 6, 21, 22, 13, 35]


class Letters:
    """What compaction needs of a task, without a tokenizer: the letters of a question are its tokens."""

    before_context, pad_id, end_id = [17, 22], 0, 2

    def encode_query(self, text: str) -> list[int]:
        return [3 + ord(character) % 45 for character in text[:6]]

    def greedy_options(self) -> dict[str, Any]:
        return {"do_sample": False, "eos_token_id": [self.end_id]}

    def decode(self, ids: list[int]) -> str:
        return "What is " + "".join(chr(97 + i % 26) for i in ids) + "?"

    def text(self, ids: list[int]) -> str:
        return " ".join(chr(97 + i % 26) * 3 for i in ids) + "."

    def encode(self, text: str) -> list[int]:
        return [3 + ord(word[0]) % 45 for word in text.split()]


def made(**options: Any) -> tuple[Compact, Text]:
    """The method on a tiny Llama in float64 with grouped key-value heads, and a text that it read."""
    torch.manual_seed(0)
    method = Compact(Backbone(tiny_model("llama").double()), **options).eval()
    method.task = Letters()
    with torch.no_grad():
        return method, method.read_text(TEXT)


def test_budgets_are_fractions_entries_or_bytes() -> None:
    assert entries_of(0.25, 80, 100) == 20
    assert entries_of(1, 80, 100) == 80
    assert entries_of(12.5, 80, 100) == 12.5
    assert entries_of(500, 80, 100) == 80
    assert entries_of("1.2KB", 80, 100) == 12
    for wrong in (0, -1, 0.001, "200", "5 apples", "99B"):
        with pytest.raises(GradmemError, match="budget"):
            entries_of(wrong, 80, 100)


def test_a_fraction_of_a_short_text_is_raised() -> None:
    assert enough(0.1, 80) == 0.1
    assert enough(0.1, 79) == 8
    assert enough(0.1, 5) == 5
    assert enough(1, 5) == 1
    for exact in (3, 16, "2KB", 1.5):
        assert enough(exact, 20) == exact


@torch.no_grad()
def test_a_short_text_keeps_enough_and_says_so() -> None:
    """The two tokens before the text count with it: of 18 entries of each head, a tenth would be two."""
    method, _ = made(budget=0.1, writers="select")
    memory = method.write(Tokens.from_lists([TEXT])).memory
    counts = memory.tensors["counts"]
    assert int(counts.sum()) == 8 * counts.numel()
    receipt = replace(stored(1).receipts[0], context_tokens=len(TEXT))
    (note,) = method.notes(replace(memory, receipts=[receipt]))
    assert "keeps 8 of the 18 entries" in note
    assert method.notes(replace(memory, receipts=[replace(receipt, context_tokens=78)])) == []
    exact, _ = made(budget=4, writers="select")
    memory = exact.write(Tokens.from_lists([TEXT])).memory
    assert int(memory.tensors["counts"].sum()) == 4 * counts.numel()
    assert exact.notes(replace(memory, receipts=[receipt])) == []


@torch.no_grad()
def test_references_hold_what_the_model_attends_to() -> None:
    """Inside and outside of the text make the attention output that goes into the output projection."""
    method, text = made()
    model, given, references = method.backbone.model, list[Tensor](), text.references
    hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda _, inputs: given.append(inputs[0][0])
    )
    ids = [*Letters.before_context, *TEXT, *text.study.queries[0], *text.study.answers[0]]
    model(torch.tensor([ids]))
    hook.remove()
    length = len(text.study.queries[0]) + len(text.study.answers[0])
    wanted = given[0][-length:].unflatten(1, (references.queries.shape[1] * references.queries.shape[2], -1))
    found = references.wanted[0, :, :, :length].flatten(0, 1).transpose(0, 1).double()
    assert torch.allclose(found, wanted, atol=1e-5)


def test_attention_splits_one_softmax() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 3, 5, 4, generator=generator), torch.randn(2, 7, 4, generator=generator)
    outside = torch.randn(2, 3, 5, generator=generator)
    unused = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    inside, rest = attention(queries, outside, keys, None, unused)
    for head, used in enumerate((7, 4)):
        scores = queries[head] @ keys[head, :used].T
        wanted = torch.cat([scores, outside[head][..., None]], -1).softmax(-1)
        assert torch.allclose(inside[head, ..., :used], wanted[..., :-1], atol=1e-6)
        assert torch.allclose(rest[head], wanted[..., -1], atol=1e-6)
    assert bool((inside[1, ..., 4:] == 0).all())


@torch.no_grad()
@pytest.mark.parametrize("score", ["contribution", "attention", "key_norm", "last"])
def test_select_keeps_the_best_of_each_head(score: Any) -> None:
    method, text = made()
    keys, values, seen = text.whole.keys, text.whole.values, text.references.seen
    entries = select(text, 4, method.metric, score, shared=False)
    assert entries.counts.tolist() == [[4] * keys.shape[1]] * keys.shape[0]
    for layer in range(keys.shape[0]):
        for head in range(keys.shape[1]):
            ranks = []
            for entry in range(1, keys.shape[2]):
                contribution = sum(
                    seen[layer, head, r, entry] * (values[layer, head, entry] @ metric @ values[layer, head, entry])
                    for r, metric in enumerate(method.metric[layer, head])
                )
                by = {"contribution": contribution, "attention": seen[layer, head, :, entry].sum(), "last": entry}
                by["key_norm"] = -keys[layer, head, entry].norm()
                ranks.append((float(by[score]), entry))
            wanted = sorted([0, *(entry for _, entry in sorted(ranks)[-3:])])
            assert torch.equal(entries.keys[layer, head], keys[layer, head, wanted])


@torch.no_grad()
def test_heads_share_one_budget() -> None:
    method, text = made()
    entries = select(text, 6.5, method.metric, "contribution", shared=True)
    layers, heads = entries.counts.shape
    assert int(entries.counts.sum()) == round(6.5 * layers * heads)
    assert int(entries.counts.min()) >= 1
    assert len(set(entries.counts.flatten().tolist())) > 1
    assert torch.equal(entries.keys[:, :, 0], text.whole.keys[:, :, 0])


@torch.no_grad()
def test_heads_see_only_their_own_entries() -> None:
    """READ of uneven heads against attention that is written out, in the first layer."""
    method, text = made()
    entries = select(text, 5, method.metric, "contribution", shared=True)
    model, given, seen = method.backbone.model, list[Tensor](), list[tuple[Tensor, ...]]()
    layer = model.model.layers[0].self_attn
    hook = layer.o_proj.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0][0]))
    from gradmem.ops.head_attention import head_attention

    hidden = ~entries.used[None]
    prefix = method.entries_prefix(entries)

    def observe(module: Any, query: Tensor, key: Tensor, value: Tensor, options: Any) -> None:
        if module.layer_idx == 0:
            seen.append((query[0], key[0], value[0]))

    with head_attention(model, hidden, observe):
        method.backbone.hidden(method.backbone.embed(torch.tensor([[7, 8, 9]])), prefix.cache, **prefix.continued(3))
    hook.remove()
    query, key, value = seen[0]
    each, most = query.shape[0] // key.shape[0], entries.keys.shape[2]
    for head in range(query.shape[0]):
        count = int(entries.counts[0, head // each])
        mine = [*range(count), *range(most, most + 3)]
        scores = query[head] @ key[head // each, mine].T * query.shape[-1] ** -0.5
        future = torch.ones(3, len(mine), dtype=torch.bool).triu(count + 1)
        wanted = scores.masked_fill(future, -torch.inf).softmax(-1) @ value[head // each, mine]
        found = given[0].unflatten(1, (query.shape[0], -1))[:, head]
        assert torch.allclose(found, wanted, atol=1e-9)


@torch.no_grad()
def test_match_moves_towards_the_whole_cache_head_by_head() -> None:
    method, text = made()
    entries = select(text, 5, method.metric, "contribution", shared=True)
    moved = match(entries, text.references, method.metric)

    def errors(one: Any) -> Tensor:
        found = text.references
        unused = ~one.used
        inside, outside = attention(found.queries, found.mass, one.keys, None, unused)
        output = torch.einsum("lhrnm,lhmd->lhrnd", inside, one.values) + outside[..., None] * found.output
        error = output - found.wanted
        return torch.einsum("lhrnd,lhrde,lhrne->lh", error, method.metric, error)

    before, after = errors(entries), errors(moved)
    real = before > 1e-6 * before.max()  # others have lost nothing
    assert bool((after[real] < before[real]).all())
    assert float(after.sum()) < 0.5 * float(before.sum())
    assert bool((moved.keys[~moved.used] == 0).all())
    # A head does not depend on the others that are moved with it.
    alone = compacted(text.whole, _kept(text, entries, 0, 0))
    assert torch.allclose(
        match(alone, text.references, method.metric).keys[0, 0, : int(entries.counts[0, 0])],
        moved.keys[0, 0, : int(entries.counts[0, 0])],
        atol=1e-5,
    )


def _kept(text: Text, entries: Any, layer: int, head: int) -> Tensor:
    """Mark the entries of one head as they were chosen, and one entry of each other head."""
    kept = torch.zeros(text.whole.keys.shape[:3], dtype=torch.bool)
    kept[..., 0] = True
    kept[layer, head, entries.places[layer, head, : int(entries.counts[layer, head])]] = True
    return kept


@torch.no_grad()
def test_fidelity_is_the_kl_divergence_of_plain_passes() -> None:
    method, text = made()
    model, head = method.backbone.model, Letters.before_context
    query, answer = text.held_out.queries[0], text.held_out.answers[0]
    asked = Asked.read(method.backbone, whole_prefix(method.backbone, method.task, TEXT), [query], [answer])
    found = fidelity(method.backbone, method.prefix(method.unwritten), asked)
    one, other = (
        model(torch.tensor([[*before, *query, *answer]])).logits[0, -len(answer) - 1 : -1].float().log_softmax(-1)
        for before in ([*head, *TEXT], head)
    )
    assert found[0] == pytest.approx(float((one.exp() * (one - other)).sum(-1).mean()), rel=1e-4)
    assert found[1] == float((one.argmax(-1) == other.argmax(-1)).double().mean())


@torch.no_grad()
def test_study_gets_nearer_or_keeps_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    method, text = made(writers="select,match,study")
    entries = select(text, 4, method.metric, "contribution", shared=True)
    monkeypatch.setattr(study_module, "PACE", replace(study_module.PACE, steps=4))
    whole = method.entries_prefix(text.whole)
    own = study_module.questions_about(text.ids, method.backbone, method.task, whole)
    asked = Asked.join([text.study, own])
    known, _ = asked.split(study_module.HELD_OUT)
    before = fidelity(method.backbone, method.entries_prefix(entries), known)[0]
    better = study_module.study(entries, text, method.backbone, method.task, method.entries_prefix)
    assert fidelity(method.backbone, method.entries_prefix(better), known)[0] < before
    monkeypatch.setattr(study_module, "PACE", replace(study_module.PACE, rate=100.0))
    assert study_module.study(entries, text, method.backbone, method.task, method.entries_prefix) is entries


@torch.no_grad()
def test_study_keeps_its_start_if_the_task_takes_no_questions() -> None:
    class Pairs(Letters):
        def encode_query(self, text: str) -> list[int]:
            raise GradmemError("this is no query")

    method, _ = made(writers="select,match,study", budget=0.5)
    method.task = Pairs()
    text = method.read_text(TEXT)
    kept = dict(method.compacted(text, 0.5))
    assert all(torch.equal(kept["study"].tensors[name], kept["match"].tensors[name]) for name in kept["match"].tensors)


@torch.no_grad()
def test_the_users_questions_are_studied_and_every_fourth_held_out() -> None:
    method, plain = made()
    method.questions = [f"{name} asks" for name in ("ann", "bob", "cid", "dan", "eve")]
    text = method.read_text(TEXT)
    assert len(text.study.queries) == len(STOCK) + 4
    assert text.held_out.queries[len(plain.held_out.queries) :] == [method.task.encode_query("dan asks")]


def test_each_sentence_asks_for_its_second_half() -> None:
    class Sentences(Letters):
        def text(self, ids: list[int]) -> str:
            return "One two three four five six seven eight. Too short. A b c d e f g h i!"

        def encode_query(self, text: str) -> list[int]:
            asked.append(text)
            return [1]

    asked: list[str] = []
    found = continuations(Sentences(), TEXT)
    assert [text.split('"')[1] for text in asked] == ["One two three four", "A b c d"]
    assert found == [([1], Letters().encode("five six seven eight.")), ([1], Letters().encode("e f g h i!"))]


def test_questions_of_another_language_are_refused() -> None:
    text = "The report was written in Oslo by Maren Tveit. The door code is 4711."
    check_language(["Who wrote the report?", "What is the door code?"], text)
    check_language(["谁写了报告？"], "报告是谁写的呢，门的密码是什么。" * 3)
    for other in ("Wer hat unterschrieben?", "谁写了报告？", "Кто написал отчёт?"):
        with pytest.raises(GradmemError, match="language of the text"):
            check_language([other], text)


@torch.no_grad()
def test_memories_of_other_shapes_are_refused() -> None:
    method, text = made(writers="select")
    (_, memory), *_ = method.compacted(text, 0.5)
    method.check(memory, "it")
    tensors = memory.tensors
    wrong: list[dict[str, Tensor]] = [
        {"counts": tensors["counts"] + 1},
        {"counts": tensors["counts"][:, 1:]},
        {"keys": tensors["keys"][..., 1:]},
        {"values": tensors["values"][:, 1:]},
        {"start": tensors["start"] - 1000},
        {"start": tensors["start"] + 10**6},
        {"more": tensors["start"]},
    ]
    for change in wrong:
        with pytest.raises(GradmemError, match="no compacted cache"):
            method.check(Memory({**tensors, **change}), "it")


@torch.no_grad()
def test_rows_are_written_as_if_each_were_alone() -> None:
    from gradmem.batch import Tokens

    method, _ = made(budget=0.5)
    both = method.write(Tokens.from_lists([TEXT, TEXT[:9]])).memory
    alone = method.write(Tokens.from_lists([TEXT[:9]])).memory
    for name, tensor in both[1].tensors.items():
        assert torch.allclose(tensor.double(), alone.tensors[name].double(), atol=1e-6), name
    assert replace(both[1], receipts=[]).nbytes == alone.nbytes


def test_training_passes_gradients_through_the_kept_entries() -> None:
    """The gradient of LoRA, through the text's own cache and the reading, is that of finite differences."""
    torch.manual_seed(0)
    model = tiny_model("llama")
    add_lora(model, 2)
    method = Compact(Backbone(model.double()), budget=0.4, writers="select")
    method.task = Letters()
    learned = [parameter for parameter in method.parameters() if parameter.requires_grad]
    assert len(learned) == 2 * 7 * model.config.num_hidden_layers
    with torch.no_grad():
        for parameter in learned:
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    context = Tokens.from_lists([TEXT, TEXT[::-1][:11]])
    queries = Tokens.from_lists([[3, 4, 9], [8, 21, 5]])

    def loss() -> Tensor:
        return method.read(method.write(context).memory, queries).square().mean()

    loss().backward()
    for parameter in (learned[0], learned[5], learned[-1]):
        assert parameter.grad is not None
        way = torch.randn(parameter.shape, dtype=parameter.dtype)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(way, alpha=sign * STEP)
            ends.append(loss().item())
            with torch.no_grad():
                parameter.sub_(way, alpha=sign * STEP)
        slope = float((parameter.grad * way).sum())
        assert abs((ends[0] - ends[1]) / (2 * STEP) - slope) < 1e-3 * max(0.1, abs(slope))
