"""Compacted caches of many model families against the plain model, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from families import tiny_model
from gradmem.backbone import Backbone
from gradmem.batch import Tokens
from gradmem.errors import GradmemError
from gradmem.memory import Memory
from gradmem.methods.compact import Compact

TEXT, QUERY = [5, 9, 11, 7, 30, 12, 8, 3, 40, 41, 4, 6], [7, 8, 9, 25, 31]
FAMILIES = ["gemma", "gpt2", "gpt_neox", "llama", "olmo", "olmo2", "phi", "phi3", "opt"]
FAMILIES += ["qwen2", "qwen3", "smollm3", "cohere"]


class Words:
    """What the method needs of a task, without a tokenizer: the letters of a question are its tokens."""

    before_context, pad_id, end_id = [17, 22], 0, 2

    def encode_query(self, text: str) -> list[int]:
        return [3 + ord(character) % 45 for character in text[:6]]

    def greedy_options(self) -> dict[str, Any]:
        return {"do_sample": False, "eos_token_id": [self.end_id]}


def compacted(kind: str, **options: Any) -> tuple[Compact, Memory]:
    """The method on a family, and what it writes of the text."""
    method = Compact(Backbone(tiny_model(kind).double()), **options).eval()
    method.task = Words()
    return method, method.write(Tokens.from_lists([TEXT])).memory


def same(method: Compact, memory: Memory, wanted: Tensor) -> bool:
    """Whether the method reads these logits of the query."""
    found = method.read(memory, Tokens.from_lists([QUERY]))[0, 1:]
    return torch.allclose(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_whole_cache_is_one_pass(kind: str) -> None:
    method, memory = compacted(kind, budget=1.0, writers="select")
    ids = torch.tensor([[*Words.before_context, *TEXT, *QUERY]])
    assert same(method, memory, method.backbone.model(ids).logits[0, -len(QUERY) :])


@torch.no_grad()
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_part_is_read_as_the_model_reads_the_same_cache(kind: str) -> None:
    """Every head keeps entries of its own, as many as every other."""
    method, memory = compacted(kind, budget=0.5, writers="select", shared=False, positions="text")
    model, tensors = method.backbone.model, memory.tensors
    layers, heads = tensors["counts"].shape[1:]
    keys, values = (tensors[name].view(layers, 1, heads, -1, tensors[name].shape[2]) for name in ("keys", "values"))
    start = len(Words.before_context) + len(TEXT)
    assert keys.shape[3] < len(TEXT)
    assert int(tensors["start"]) == start
    places = torch.arange(start, start + len(QUERY))[None]
    cache = DynamicCache([*zip(keys, values, strict=True)])
    wanted = model(torch.tensor([QUERY]), past_key_values=cache, position_ids=places).logits[0]
    assert same(method, memory, wanted)


@pytest.mark.parametrize("kind", ["falcon", "gptj"])
def test_attention_of_its_own_kind_is_refused(kind: str) -> None:
    with pytest.raises(GradmemError, match="attention cannot be observed"):
        compacted(kind)
