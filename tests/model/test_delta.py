"""The difference of a trained model to a pretrained one, in four bits a weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from gradmem import load
from gradmem.errors import GradmemError
from gradmem.model import MemoryModel
from gradmem.model.delta import factors, load_delta, packed, product, save_delta, unpacked
from gradmem.tasks.text import byte_tokenizer


@pytest.fixture
def pretrained(tmp_path: Path) -> str:
    """A tiny language model with tied embeddings, and a tokenizer that pads with a token more."""
    place, words = tmp_path / "model", byte_tokenizer()
    words.add_special_tokens({"pad_token": "[MORE]"})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        size = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
        LlamaForCausalLM(LlamaConfig(vocab_size=len(words) - 1, tie_word_embeddings=True, **size)).save_pretrained(
            place
        )
    words.save_pretrained(place)
    return str(place)


def trained(pretrained: str, **options: Any) -> MemoryModel:
    """A model whose weights have moved."""
    method = {"name": "gradmem", "n_mem": 2, "n_ctrl": 1, "learn_inner_lr": True, "freeze_embeddings": True, **options}
    model = MemoryModel.from_spec({"name": "qa", "tokenizer": pretrained}, {"pretrained": pretrained}, method)
    with torch.no_grad():
        for parameter in model.method.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
    return model


def test_frozen_embeddings_are_the_output_layer_too(pretrained: str) -> None:
    names = {name for name, p in trained(pretrained).method.named_parameters() if not p.requires_grad}
    assert names == {"backbone.model.model.embed_tokens.weight"}


def test_a_difference_comes_back(pretrained: str, tmp_path: Path) -> None:
    """Matrices to about a tenth of how far they moved, everything else exactly; the files are small."""
    model = trained(pretrained)
    files = save_delta(model, pretrained, tmp_path / "delta")
    with pytest.raises(GradmemError, match="a file does not decide what is loaded"):
        load_delta(tmp_path / "delta")
    back = load_delta(tmp_path / "delta", pretrained)
    start = trained(pretrained).method.state_dict() | LlamaForCausalLM.from_pretrained(pretrained).state_dict()
    matrices = 0
    for name, weight in model.method.state_dict().items():
        found = back.method.state_dict()[name]
        if "proj.weight" in name:
            base, matrices = start[name.removeprefix("backbone.model.")], matrices + weight.numel()
            assert 0 < (found - weight).norm() < 0.12 * (weight - base).norm()
        else:
            assert torch.equal(found, weight), name
    assert sum(file.stat().st_size for file in files) < 0.6 * matrices + 20_000
    assert back.spec["method"] == model.spec["method"]
    back.save_pretrained(tmp_path / "whole")
    assert MemoryModel.from_pretrained(str(tmp_path / "whole")).fingerprints == back.fingerprints


def test_a_difference_is_of_one_model(pretrained: str, tmp_path: Path) -> None:
    save_delta(trained(pretrained), pretrained, tmp_path / "delta")
    other = LlamaForCausalLM.from_pretrained(pretrained)
    with torch.no_grad():
        other.model.norm.weight[0] += 1
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(pretrained).save_pretrained(tmp_path / "other")
    with pytest.raises(GradmemError, match="difference to another model"):
        load_delta(tmp_path / "delta", str(tmp_path / "other"))
    (tmp_path / "delta/delta-1.safetensors").unlink()
    with pytest.raises(GradmemError, match=r"no delta-1\.safetensors"):
        load_delta(tmp_path / "delta")


def test_rounding_is_to_the_nearest_of_fifteen() -> None:
    """Whatever the size of a group; zeros stay zeros."""
    values = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [1e-4], [0.0]])
    back = unpacked(*packed(values))
    steps = values.unflatten(1, (-1, 32)).abs().amax(2, keepdim=True) / 7
    off = (back - values).unflatten(1, (-1, 32)).abs()
    assert bool((off <= 0.53 * steps).all())
    assert torch.equal(back[2], values[2])


def test_lora_on_a_backbone_is_saved_merged_and_small(pretrained: str, tmp_path: Path) -> None:
    """Only LoRA is trained; a checkpoint holds merged weights, and a difference of its rank all that was learned."""
    spec = ({"name": "qa", "tokenizer": pretrained}, {"pretrained": pretrained, "lora": 2}, {"name": "full_context"})
    model = MemoryModel.from_spec(*spec)
    learned = {name: p for name, p in model.method.named_parameters() if p.requires_grad}
    assert {name.split(".")[-3] for name in learned} == {"lora_A", "lora_B"}
    with torch.no_grad():
        for parameter in learned.values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        ids = torch.arange(12)[None]
        wanted = model.method.backbone.hidden(model.method.backbone.embed(ids))
        model.save_pretrained(tmp_path / "whole")
        assert torch.equal(model.method.backbone.hidden(model.method.backbone.embed(ids)), wanted)
        whole = load(tmp_path / "whole")
        torch.testing.assert_close(whole.method.backbone.hidden(whole.method.backbone.embed(ids)), wanted)
        files = save_delta(whole, pretrained, tmp_path / "delta", rank=2)
        back = load_delta(tmp_path / "delta", pretrained)
        found = back.method.backbone.hidden(back.method.backbone.embed(ids))
    untrained = MemoryModel.from_spec(spec[0], {"pretrained": pretrained}, spec[2]).method.backbone
    moved = (untrained.hidden(untrained.embed(ids)) - wanted).norm()
    assert (found - wanted).norm() < 0.02 * moved
    numbers = sum(parameter.numel() for parameter in learned.values())
    assert files[0].stat().st_size < 2 * numbers + 6_000
    with pytest.raises(GradmemError, match="rank of at least 1"):
        MemoryModel.from_spec(spec[0], {"pretrained": pretrained, "lora": 0}, spec[2])


def test_products_are_the_same_in_any_order() -> None:
    """Fingerprints of checkpoints must not depend on how a machine sums."""
    left, right = factors(torch.randn(96, 64, generator=torch.Generator().manual_seed(1)), 16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(2))
    assert torch.equal(product(left, right), product(left[:, order], right[order]))
