"""Model families against whole passes without a cache; `tests/system` takes all that transformers knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel, TextStreamer

import gradmem
from families import check, made, tiny_model
from gradmem import GradmemError, MemoryModel
from gradmem.backbone import Backbone
from gradmem.batch import Batch, Tokens
from gradmem.memory import Memory
from gradmem.methods import ARMT, RMT, FullContext, GradMem
from gradmem.serving import Engine
from gradmem.tasks.text import byte_tokenizer

TEXT = "The ferry to Orso leaves at ten."
SHORT, LONG = "When?", "When does the ferry leave, and where does it go to after that?"
# Windows in the cache, windows of its own, positions counted by the mask, and capped logits.
SIX = ["bloom", "gemma2", "gpt2", "gpt_neo", "llama", "mistral"]


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
    for kind in ("mistral", "gpt_neo"):
        with pytest.raises(GradmemError, match="needs full attention"):
            FullContext(Backbone(tiny_model(kind)))
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


# --- Whole models -----------------------------------------------------------------------------------------


def directory(place: Path, kind: str, **fields: Any) -> Path:
    """A language model with a tokenizer of bytes."""
    tokenizer = byte_tokenizer()
    model = tiny_model(kind, vocab_size=len(tokenizer), max_position_embeddings=256, **fields)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def opened(place: Path) -> tuple[MemoryModel, Memory]:
    model = gradmem.load(place, {"n_mem": 4, "write_steps": 1})
    return model, model.write(TEXT)


def greedy(model: MemoryModel, memory: Memory, query: str, length: int) -> list[int]:
    """The likeliest next tokens by whole passes over memory, query and answer."""
    language_model: PreTrainedModel = model.method.backbone.model
    ids = model.task.encode(query)
    new: list[int] = []
    with torch.no_grad():
        while len(new) < length and model.task.end_id not in new:
            embeds = model.method.backbone.embed(torch.tensor([ids + new]))
            given = torch.cat([memory.tensors["memory"], embeds], 1)
            new.append(int(language_model(inputs_embeds=given, use_cache=False).logits[0, -1].argmax()))
    return new


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_answers_do_not_depend_on_the_neighbour(kind: str, tmp_path: Path) -> None:
    model, memory = opened(directory(tmp_path, kind))
    other = model.write("Nothing leaves.")
    answers = [model.task.decode(greedy(model, memory, query, 8)) for query in (SHORT, LONG)]
    assert memory.ask([SHORT, LONG], max_new_tokens=8) == answers
    alone, batch = memory.answer(SHORT, max_new_tokens=8), memory.answer([SHORT, LONG], max_new_tokens=8)[0]
    assert batch.text == alone.text == answers[0]
    assert batch.logprob == pytest.approx(alone.logprob, abs=1e-3)
    told: dict[str, list[str]] = {SHORT: [], LONG: [], TEXT: []}
    with Engine(model, max_wait_ms=300) as engine:
        asked = [(1, memory, SHORT), (1, memory, LONG), (2, other, TEXT)]
        futures = [engine.ask(key, one, query, on_text=told[query].append) for key, one, query in asked]
        for (_, one, query), future in zip(asked, futures, strict=True):
            assert future.result().text == one.ask(query)
            assert one.ask(query).startswith(told[query][-1])  # what later tokens may change is not told yet


GENERATION: dict[str, dict[str, Any]] = {
    "nothing": {},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "do_sample": True, "temperature": 0.7},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "early_stopping": True},
    "caches": {"use_cache": False, "cache_implementation": "static", "return_dict_in_generate": True},
    "tokens": {"suppress_tokens": [*range(3, 100)], "forced_eos_token_id": 2, "min_new_tokens": 3, "eos_token_id": 40},
    "lookup": {"prompt_lookup_num_tokens": 3, "max_length": 5},
}


@pytest.mark.parametrize("settings", GENERATION)
def test_answers_do_not_obey_the_models_directory(settings: str, tmp_path: Path) -> None:
    place = directory(tmp_path, "llama")
    (place / "generation_config.json").write_text(json.dumps(GENERATION[settings]))
    model, memory = opened(place)
    assert memory.ask(SHORT, max_new_tokens=10) == model.task.decode(greedy(model, memory, SHORT, 10))
    # Loading leaves the file out; a model that somebody else has loaded brings it along.
    model.method.backbone.model.generation_config = GenerationConfig(**GENERATION[settings])
    assert memory.ask(SHORT, max_new_tokens=10) == model.task.decode(greedy(model, memory, SHORT, 10))


@pytest.mark.parametrize("field", [{"use_cache": False}, {"return_dict": False}, {"output_attentions": True}], ids=str)
def test_answers_do_not_depend_on_fields_that_compute_nothing(field: dict[str, bool], tmp_path: Path) -> None:
    place = directory(tmp_path, "llama")
    model, memory = opened(place)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | field))
    changed, _ = opened(place)
    assert changed.ask(memory_of(changed, memory), SHORT, max_new_tokens=8) == memory.ask(SHORT, max_new_tokens=8)
    assert model.task.decode(greedy(model, memory, SHORT, 8)) == memory.ask(SHORT, max_new_tokens=8)


def memory_of(model: MemoryModel, memory: Memory) -> Memory:
    """The tensors of a memory, for another model."""
    return Memory(dict(memory.tensors), memory.receipts, model)


@pytest.mark.parametrize(
    "option",
    [
        {"prompt_lookup_num_tokens": 2},
        {"cache_implementation": "static"},
        {"cache_implementation": "quantized"},
        {"use_cache": False},
        {"repetition_penalty": 1.2},
        {"no_repeat_ngram_size": 2},
        {"max_length": 20},
        {"assistant_model": None},
        {"past_key_values": None},
        {"inputs_embeds": None},
        {"max_new_token": 3},
    ],
    ids=str,
)
def test_options_that_would_change_what_is_read_are_refused_by_name(option: dict[str, Any], tmp_path: Path) -> None:
    _, memory = opened(directory(tmp_path, "llama"))
    with pytest.raises(GradmemError, match=f"`{next(iter(option))}`"):
        memory.ask(SHORT, **option)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "length_penalty": 0.2, "early_stopping": True},
        {"suppress_tokens": [*range(3, 80)]},
        {"min_new_tokens": 5},
    ],
    ids=str,
)
def test_options_do_what_transformers_does(options: dict[str, Any], tmp_path: Path) -> None:
    model, memory = opened(directory(tmp_path, "mistral"))
    language_model, ids = model.method.backbone.model, model.task.encode(SHORT)
    given = torch.cat([memory.tensors["memory"], model.method.backbone.embed(torch.tensor([ids]))], 1)
    settings = {
        "max_new_tokens": 6,
        "do_sample": False,
        "eos_token_id": model.task.end_id,
        "pad_token_id": 0,
        **options,
    }
    wanted = [model.task.decode(row) for row in language_model.generate(inputs_embeds=given, **settings).tolist()]
    found = memory.ask([SHORT, LONG], max_new_tokens=6, **options)[0]
    assert found == (wanted if len(wanted) > 1 else wanted[0])


def test_streamers_of_transformers_see_query_and_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, memory = opened(directory(tmp_path, "llama"))
    capsys.readouterr()
    answer = memory.ask(SHORT, max_new_tokens=6, streamer=TextStreamer(model.task.tokenizer))
    assert capsys.readouterr().out.strip("\n") == SHORT + answer


def test_sampling_is_by_the_models_own_probabilities(tmp_path: Path) -> None:
    """A temperature in the directory does not sharpen what is asked for."""
    place = directory(tmp_path, "llama")
    (place / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 1e-4, "top_k": 1}))
    _, memory = opened(place)
    torch.manual_seed(0)
    assert len({memory.ask(SHORT, do_sample=True, max_new_tokens=8) for _ in range(4)}) > 1


def test_an_option_that_transformers_refuses_is_one_line(tmp_path: Path) -> None:
    _, memory = opened(directory(tmp_path, "llama"))
    with pytest.raises(GradmemError, match="cannot generate") as raised:
        memory.ask(SHORT, num_return_sequences=2)
    assert "\n" not in str(raised.value)


def test_gradmem_alone_takes_models_that_full_context_refuses() -> None:
    assert isinstance(made("mistral"), GradMem)
