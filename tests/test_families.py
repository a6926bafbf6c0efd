"""Model families against whole passes without a cache; `tests/system` takes all that transformers knows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from families import check, made, tiny_model
from gradmem import GradmemError
from gradmem.backbone import Backbone
from gradmem.batch import Batch, Tokens
from gradmem.memory import Memory
from gradmem.methods import ARMT, RMT, FullContext, GradMem

# Windows in the cache, windows of its own, positions counted by the mask, and capped logits.
SIX = ["bloom", "gemma2", "gpt2", "gpt_neo", "llama", "mistral"]
WHOLE: list[tuple[str, dict[str, Any]]] = [
    *[(kind, {}) for kind in ("bloom", "falcon", "gemma", "gpt2", "gpt_neox", "llama", "olmo", "olmo2", "phi", "phi3")],
    *[(kind, {}) for kind in ("qwen2", "qwen3", "smollm3", "cohere", "gptj", "opt")],
    ("falcon", {"alibi": True, "new_decoder_architecture": False}),
    *[(kind, {"sliding_window": 24}) for kind in ("cohere2", "gemma2", "gemma3_text", "mistral", "phi3")],
    (
        "qwen2",
        {"sliding_window": 24, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
    ),
]
"""Families whose layers all attend to all earlier tokens, or do within windows of 24."""


@pytest.mark.parametrize("kind", SIX)
def test_read_is_one_pass(kind: str) -> None:
    check(made(kind))


def test_logits_are_scaled_as_the_model_does() -> None:
    """Also with weights so small that any scale would pass a comparison of logits."""
    for size in (1.0, 1e-6):
        model = tiny_model("granite")
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(size)
        backbone = Backbone(model)
        embeds = backbone.embed(torch.tensor([[3, 4, 5]]))
        wanted = model(inputs_embeds=embeds, use_cache=False).logits
        found = backbone.head(backbone.hidden(embeds))
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
        assert wanted.abs().max().item() < 1e-2 or size == 1


def test_write_descends_the_loss_of_the_models_own_logits() -> None:
    """Losses of a context under capped logits, which the output layer alone does not give."""
    method = made("gemma2")
    context = Tokens.from_lists([[5, 9, 11, 7, 30, 12, 8, 3, 40]])
    written = method.write(context)
    vectors = written.memory.tensors["memory"][0, 0]  # of the first chunk, of four tokens
    embeds = torch.cat([vectors, method.backbone.embed(context.ids[0, :4])])
    logits = method.backbone.model(inputs_embeds=embeds[None], use_cache=False).logits[0, 2:6]
    wanted = torch.nn.functional.cross_entropy(logits, context.ids[0, :4], reduction="none")
    found = method.token_losses(written.memory, context)[0, :4]
    assert torch.allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("rwkv", "does not keep the memory in the cache"),
        ("openai-gpt", "does not keep the memory in the cache"),
        ("bert", "before the output layer"),
        ("gemma4_text", "inputs_embeds"),
        ("jamba", "reads through keys and values"),
    ],
)
def test_refused(kind: str, why: str) -> None:
    with pytest.raises(GradmemError, match=why) as raised:
        made(kind)
    assert "\n" not in str(raised.value)


def test_a_probe_that_cannot_tell_assumes_the_worst() -> None:
    """Where weights are so small that the memory moves nothing, nothing is known of pads."""
    model = tiny_model("llama")
    assert Backbone(model).batches_uneven
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    assert not Backbone(model).batches_uneven


def test_logits_that_change_in_other_ways_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    forward = model.forward

    def changed(*given: Any, **options: Any) -> Any:
        output = forward(*given, **options)
        output.logits = output.logits.abs()
        return output

    monkeypatch.setattr(model, "forward", changed)
    with pytest.raises(GradmemError, match="'llama' cannot serve as a backbone: it changes its logits"):
        Backbone(model)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradient_checkpointing_changes_nothing(kind: str) -> None:
    """In training, layers that compute activations again in the backward pass would not see the memory."""
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0) if kind == "gpt2" else {}
    method = made(kind, **dropout)
    method.chunk_by(None)
    memory = method.write(Tokens.from_lists([[5, 9, 11, 7]])).memory
    queries = Tokens.from_lists([[8, 3, 40]])
    method.train()
    found = []
    for checkpoints in (False, True):
        if checkpoints:
            method.backbone.model.gradient_checkpointing_enable()
        one, other = (method.read(Memory({"memory": memory.tensors["memory"] * x}), queries)[:, 1:] for x in (1, -1))
        assert float((one - other).detach().abs().max()) > 0.1
        found.append(one)
        assert method.generate(memory, [[8, 3]], max_new_tokens=2) == method.eval().generate(
            memory, [[8, 3]], max_new_tokens=2
        )
        method.train()
    assert torch.allclose(*found, atol=1e-5)
    kept = [vars(module).get("gradient_checkpointing") for module in method.backbone.model.modules()]
    assert any(kept), "it is as it was for everything else"


def test_methods_that_need_more_than_that_refuse_windows() -> None:
    with pytest.raises(GradmemError, match="'gpt_neo' restricts them by attention_types and window_size"):
        FullContext(Backbone(tiny_model("gpt_neo")))
    for kind in ("mistral", "gpt_neo"):
        with pytest.raises(GradmemError, match="needs attention masks"):
            ARMT(Backbone(tiny_model(kind)))
    with pytest.raises(GradmemError, match="needs attention masks"):
        ARMT(Backbone(tiny_model("bloom")))


def test_rmt_reads_windows() -> None:
    """Written and asked in one batch as alone."""
    method = RMT(Backbone(tiny_model("mistral")), n_mem=3).eval()
    context = Tokens.from_lists([[5, 9, 11, 7, 30, 12, 8, 3, 40], [4, 6]])
    queries = [[7, 8], [30, 31, 32, 33, 34, 35, 36, 37, 38]]
    with torch.no_grad():
        memory = method.write(context).memory
        both = method.generate(memory, queries, max_new_tokens=5)
        for row in range(2):
            ids = context.ids[row, context.mask[row]].tolist()
            alone = method.write(Tokens.from_lists([ids])).memory
            assert torch.allclose(alone.tensors["memory"][0], memory.tensors["memory"][row], atol=1e-5)
            assert method.generate(alone, [queries[row]], max_new_tokens=5) == [both[row]]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "fields"), WHOLE)
def test_full_context_is_one_pass(kind: str, fields: dict[str, Any]) -> None:
    """Two contexts and queries of different lengths; with a window, a context and a query that fill it."""
    method = FullContext(Backbone(tiny_model(kind, **fields).double())).eval()
    plain = tiny_model(kind, **fields | dict.fromkeys(fields.keys() & {"sliding_window"}, 64)).double()
    if "sliding_window" in fields:
        assert method.max_context == 12
        longer = torch.arange(3, 28)[None]
        hidden = [model(longer, use_cache=False).logits[0] for model in (method.backbone.model, plain)]
        assert [torch.allclose(*(rows[n - 1] for rows in hidden)) for n in (24, 25)] == [True, False]
    texts = [[5, 9, 11, 7, 30, 12, 8, 3, 40, 41, 4, 6], [30, 3, 17, 22, 9]]
    queries, new = [[7, 8, 9, 25, 31, 4, 19, 8], [30, 6, 44]], 4
    memory = method.write(Tokens.from_lists(texts)).memory
    read = method.read(memory, Tokens.from_lists(queries))
    answers = method.generate(memory, queries, max_new_tokens=new, suppress_tokens=[0, 1, 2])
    for row, (text, query, answer) in enumerate(zip(texts, queries, answers, strict=True)):
        wanted = plain(torch.tensor([text + query + answer]), use_cache=False).logits[0, len(text) :]
        asked, largest = len(query), float(wanted.abs().max())
        assert torch.allclose(read[row, 1 : asked + 1], wanted[:asked], rtol=0, atol=1e-5 * largest)
        assert answer == (wanted[asked - 1 : -1, 3:].argmax(1) + 3).tolist()
        assert len(answer) == new


def test_full_context_in_batches_of_models_that_count_for_themselves() -> None:
    method = FullContext(Backbone(tiny_model("mpt"))).eval()
    assert not method.backbone.batches_uneven
    context = Tokens.from_lists([[5, 9, 11, 7, 30, 12], [4, 6]])
    queries = Tokens.from_lists([[7, 8, 9], [30, 31]])
    with torch.no_grad():
        read = method.read(method.write(context).memory, queries)
        labels = queries.ids.masked_fill(~queries.mask, -100)
        batch = Batch(context, queries, labels, torch.arange(2))
        targets = method.read_targets(method.write(context).memory, batch)
        for row, end in enumerate((3, 2)):
            ids = torch.cat([context.ids[row, context.mask[row]], queries.ids[row, :end]])
            wanted = method.backbone.model(ids[None], use_cache=False).logits[0, -end:]
            assert torch.allclose(read[row, 1 : end + 1], wanted, atol=1e-4)
    assert torch.allclose(targets[1:3], read[0, 1:3], atol=1e-4)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_inputs_end_where_rotary_angles_would_change(rope: str) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4} if rope == "longrope" else {}
    given = {"rope_type": rope, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32, **factors}
    assert Backbone(tiny_model("llama", rope_parameters=given)).max_positions == 32
    assert Backbone(tiny_model("llama")).max_positions == 128


def test_gradmem_alone_takes_models_that_full_context_refuses() -> None:
    assert isinstance(made("gpt_neo"), GradMem)
