"""Compacted caches of many model families against the plain model, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from families import tiny_model
from gradmem.backbone import Backbone
from gradmem.batch import Tokens
from gradmem.errors import GradmemError
from gradmem.exports.cartridge import save_cartridge
from gradmem.memory import Memory
from gradmem.methods.compact import Compact

TEXT, QUERY = [5, 9, 11, 7, 30, 12, 8, 3, 40, 41, 4, 6], [7, 8, 9, 25, 31]
PLAIN = ["cohere", "gemma", "gpt2", "gpt_neox", "llama", "olmo", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen3"]
PLAIN += ["smollm3"]
WINDOWS = ["cohere2", "gemma2", "gemma3_text", "mistral"]
FAMILIES = [*((kind, {}) for kind in PLAIN), *((kind, {"sliding_window": 120}) for kind in WINDOWS)]


class Words:
    """What the method needs of a task, without a tokenizer: the letters of a question are its tokens."""

    before_context, pad_id, end_id = [17, 22], 0, 2

    def encode_query(self, text: str) -> list[int]:
        return [3 + ord(character) % 45 for character in text[:6]]

    def text(self, ids: list[int]) -> str:
        return " ".join(chr(97 + i % 26) for i in ids) + "."

    def encode(self, text: str) -> list[int]:
        return [3 + ord(character) % 45 for character in text if character != " "]

    def greedy_options(self) -> dict[str, Any]:
        return {"do_sample": False, "eos_token_id": [self.end_id]}


def compacted(kind: str, fields: dict[str, Any], **options: Any) -> tuple[Compact, Memory]:
    """The method on a family, and what it writes of the text."""
    method = Compact(Backbone(tiny_model(kind, **fields).double()), **options).eval()
    method.task = Words()
    return method, method.write(Tokens.from_lists([TEXT])).memory


def same(method: Compact, memory: Memory, wanted: Tensor) -> bool:
    """Whether the method reads these logits of the query."""
    found = method.read(memory, Tokens.from_lists([QUERY]))[0, 1:]
    return torch.allclose(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize(("kind", "fields"), FAMILIES)
def test_the_whole_cache_is_one_pass(kind: str, fields: dict[str, Any]) -> None:
    method, memory = compacted(kind, fields, budget=1.0, writers="select")
    ids = torch.tensor([[*Words.before_context, *TEXT, *QUERY]])
    assert same(method, memory, method.backbone.model(ids).logits[0, -len(QUERY) :])


@torch.no_grad()
@pytest.mark.parametrize(("kind", "fields"), FAMILIES)
def test_a_part_is_read_as_the_model_reads_the_same_cache(kind: str, fields: dict[str, Any]) -> None:
    """Every head keeps entries of its own, as many as every other; questions begin after the text or the memory."""
    kept: dict[str, Tensor] = {}
    for positions in ("text", "memory"):
        method, memory = compacted(kind, fields, budget=7, writers="select", shared=False, positions=positions)
        model, tensors = method.backbone.model, memory.tensors
        shape = tensors["counts"].shape[1:]
        keys, values = (tensors[name][0].unflatten(0, (*shape, -1))[:, None] for name in ("keys", "values"))
        begin = {"text": len(Words.before_context) + len(TEXT), "memory": keys.shape[3]}[positions]
        assert keys.shape[3] == 7
        assert int(tensors["start"]) == begin
        places = torch.arange(begin, begin + len(QUERY))[None]
        cache = DynamicCache([*zip(keys, values, strict=True)])
        assert same(method, memory, model(torch.tensor([QUERY]), past_key_values=cache, position_ids=places).logits[0])
        kept[positions] = keys[0, 0]
    # In the first layer, a key is that of its token alone at its position.
    ids = torch.tensor([*Words.before_context, *TEXT])
    alone = torch.stack(
        [
            model(ids[:, None], position_ids=p.expand(14, 1)).past_key_values.layers[0].keys[:, :, 0]
            for p in torch.arange(14)
        ]
    )
    for head, (old, new) in enumerate(zip(kept["text"], kept["memory"], strict=True)):
        own = alone[torch.arange(14), torch.arange(14), head]
        which = torch.cdist(old, own).argmin(1)
        wanted = alone[torch.arange(7), which, head]
        assert torch.allclose(new, wanted if kind not in ("gpt2", "opt") else old, rtol=0, atol=1e-5)


@torch.no_grad()
def test_peft_reads_the_exported_memory(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    if not hasattr(peft, "CartridgeConfig"):
        pytest.skip(f"peft {peft.__version__} has no CARTRIDGE")
    method, memory = compacted("llama", {}, budget=0.5, shared=False)
    save_cartridge(memory, tmp_path)
    model = method.float().backbone.model
    wanted = method.read(memory, Tokens.from_lists([QUERY]))[0, 1:]
    found = peft.PeftModel.from_pretrained(model, tmp_path).eval()(input_ids=torch.tensor([QUERY])).logits[0]
    assert torch.allclose(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", ["falcon", "gptj"])
def test_attention_of_its_own_kind_is_refused(kind: str) -> None:
    with pytest.raises(GradmemError, match="cannot observe the attention of"):
        compacted(kind, {})
