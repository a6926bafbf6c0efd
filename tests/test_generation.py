"""Answers of whole models: those that transformers generates from memory and query in one text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel, TextStreamer

import gradmem
from families import tiny_model
from gradmem import BoundMemory, GradmemError, MemoryModel
from gradmem.memory import Memory
from gradmem.serving import Engine
from gradmem.tasks.text import byte_tokenizer

TEXT = "The ferry to Orso leaves at ten."
SHORT, LONG = "When?", "When does the ferry leave, and where does it go to after that?"


def directory(place: Path, kind: str, **fields: Any) -> Path:
    """A language model with a tokenizer of bytes."""
    tokenizer = byte_tokenizer()
    model = tiny_model(kind, vocab_size=len(tokenizer), max_position_embeddings=256, **fields)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def opened(place: Path) -> tuple[MemoryModel, BoundMemory]:
    model = gradmem.load(place, {"name": "cram", "n_mem": 4, "write_steps": 1})
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
    same = BoundMemory(memory.tensors, memory.receipts, model=changed)
    assert same.ask(SHORT, max_new_tokens=8) == memory.ask(SHORT, max_new_tokens=8)
    assert model.task.decode(greedy(model, memory, SHORT, 8)) == memory.ask(SHORT, max_new_tokens=8)


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
