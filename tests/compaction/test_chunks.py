"""Chunks of a document: read together as one cache, chosen by attention, and asked through every door."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import gradmem
from chat_models import save_model
from gradmem.batch import Tokens
from gradmem.compaction.chunks import PLAIN, attention_to_chunks
from gradmem.compaction.entries import Entries
from gradmem.serving.engine import Engine
from gradmem.store import Store

CHUNKS = ["Ann signed the paper.\n", "The door code is 4711. ", "It rained."]
QUERIES = ["What is the code?", "Who signed?"]


def model(folder: Path, **options: Any) -> gradmem.MemoryModel:
    given = {"name": "compact", "writers": "select", "budget": 0.5, **options}
    made = gradmem.load(save_model(folder), given)
    made.method.double()
    return made


def plain_logits(made: gradmem.MemoryModel, query: list[int], ordered: bool) -> Tensor:
    """Logits of the model itself after the cache of each chunk, which it reads alone at the chunk's positions."""
    before, texts = made.task.before_context, [made.task.encode(text) for text in CHUNKS]
    language_model, behind, parts = made.method.backbone.model, 0, []
    with torch.no_grad():
        for row, text in enumerate(texts):
            places = torch.arange(len(before) + len(text))[None] + behind
            cache = language_model(torch.tensor([[*before, *text]]), position_ids=places).past_key_values
            own = len(before) if row else 0
            parts.append([(layer.keys[:, :, own:], layer.values[:, :, own:]) for layer in cache.layers])
            behind += len(text) if ordered else 0
        layers = [
            tuple(torch.cat(tensors, 2) for tensors in zip(*layer, strict=True)) for layer in zip(*parts, strict=True)
        ]
        begin = len(before) + (behind if ordered else max(map(len, texts)))
        places = torch.arange(begin, begin + len(query))[None]
        return language_model(torch.tensor([query]), position_ids=places, past_key_values=DynamicCache(layers)).logits[
            0
        ]


@pytest.mark.parametrize("ordered", [True, False])
def test_whole_caches_are_read_as_the_model_reads_them(tmp_path: Path, ordered: bool) -> None:
    """Texts stand one after the other; without positions for all of them, each stands where a text begins."""
    made = model(tmp_path, budget=1.0)
    if not ordered:
        made.method.backbone.model.config.max_position_embeddings = 512
    query = made.task.encode_query(QUERIES[0])
    wanted = plain_logits(made, query, ordered)
    memory = made.write(CHUNKS)
    found = made.method.read(made.method.together(memory), Tokens.from_lists([query]))[0, 1:]
    assert torch.allclose(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    assert memory.ask(QUERIES[0], max_new_tokens=1) == made.task.decode([int(wanted[-1].argmax())])


def test_attention_to_chunks(tmp_path: Path) -> None:
    """From the projections of the model itself, which reads a query without a text, placed behind the longest."""
    made = model(tmp_path)
    memory, task, language_model = made.write(CHUNKS), made.task, made.method.backbone.model
    start, begin, projected = int(memory.tensors["start"].max()), len(task.before_context), {}

    def drawn(query: list[int]) -> Tensor:
        """For each chunk the largest part of a token's attention, averaged over layers and heads."""
        ids, places = [*task.before_context, *query], [*range(begin), *range(start, start + len(query))]
        with torch.no_grad():
            language_model(torch.tensor([ids]), position_ids=torch.tensor([places]))
            turn = language_model.model.rotary_emb(torch.zeros(1, dtype=torch.double), torch.tensor([places]))
        means: list[list[Tensor]] = [[] for _ in CHUNKS]
        for layer, (asked, known) in projected.items():
            shaped = (one.view(1, len(ids), -1, 8).transpose(1, 2) for one in (asked, known))
            asked, known = apply_rotary_pos_emb(*shaped, *turn)
            own = (asked[0] @ known[0].transpose(1, 2) / 8**0.5)[:, begin:].exp()
            rest = own.tril(begin).sum(-1)
            for row, mine in enumerate(means):
                before, count = (int(memory.tensors[name][row, layer, 0]) for name in ("before", "counts"))
                skip = int(memory.tensors["counts"][row, :layer].sum())
                keys = memory.tensors["keys"][row, skip + before : skip + count]
                mass = (asked[0, :, begin:] @ keys.T / 8**0.5).exp().sum(-1)
                mine.extend((mass / (mass + rest)).amax(-1))
        return torch.stack([torch.stack(mine).mean() for mine in means])

    for number, layer in enumerate(language_model.model.layers):
        for place, name in enumerate(("q_proj", "k_proj")):
            projected.setdefault(number, [None, None])

            def note(module: Any, given: Any, found: Tensor, at: tuple[int, int] = (number, place)) -> None:
                projected[at[0]][at[1]] = found

            getattr(layer.self_attn, name).register_forward_hook(note)
    rows = [Entries.of(memory, row) for row in range(3)]
    query, plain = (task.encode_query(text) for text in (QUERIES[0], PLAIN))
    wanted = drawn(query) - drawn(plain)
    found = attention_to_chunks(
        made.method.backbone, made.method.prefix(made.method.unwritten), rows, start, query, plain
    )
    assert torch.allclose(found.double(), wanted, rtol=0, atol=1e-5)
    made.method.read_chunks = 2
    assert memory.chosen(query) == tuple(sorted(wanted.topk(2).indices.tolist()))


def test_every_door_reads_the_chosen_chunks(tmp_path: Path) -> None:
    made = model(tmp_path, read_chunks=2)
    made.method.float()
    memory = made.write(CHUNKS)
    rows = [memory.chosen(made.task.encode_query(query)) for query in QUERIES]
    assert all(len(own) == 2 for own in rows)
    wanted = [memory.together(own).ask(query, max_new_tokens=8) for own, query in zip(rows, QUERIES, strict=True)]
    assert memory.ask(QUERIES, max_new_tokens=8) == wanted
    assert [one.text for one in memory.answer(QUERIES, max_new_tokens=8)] == wanted
    assert memory.ask([[query] for query in (*QUERIES, QUERIES[0])], max_new_tokens=8)[0] == [
        memory[0].ask(QUERIES[0], max_new_tokens=8)
    ], "a list for each row asks each row for itself"
    longer = memory.answer(QUERIES)
    with Store(tmp_path / "store.db") as store:
        stored = made.bind(store.load(store.put(memory, name="d").id))
    with Engine(made) as engine:
        asked = [engine.ask("d", stored, query) for query in QUERIES]
        assert [one.result().text for one in asked] == [one.text for one in longer]


def test_rows_that_are_no_chunks_are_still_refused(tmp_path: Path) -> None:
    made = gradmem.load(save_model(tmp_path), {"name": "cram", "write_steps": 1})
    memory = made.write(["a", "b"])
    with pytest.raises(gradmem.GradmemError, match="2 rows"):
        memory.ask("a")
    with Engine(made) as engine, pytest.raises(gradmem.GradmemError, match="one memory"):
        engine.ask("m", memory, "a")
