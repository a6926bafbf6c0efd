"""Moved keys against those of the model itself, run at the other positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from families import tiny_model
from gradmem import GradmemError
from gradmem.key_positions import KeyMover
from gradmem.model_runner import ModelRunner

SCALED: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
}
GLOBAL_AND_LOCAL = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
CASES: list[tuple[str, dict[str, Any]]] = [
    *[(kind, {}) for kind in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "olmo2")],
    *[("llama", {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **more}}) for kind, more in SCALED.items()],
    ("gemma3_text", {"rope_parameters": GLOBAL_AND_LOCAL}),
    *[(kind, {}) for kind in ("gpt_neox", "phi")],  # only a part of the width turns
    ("smollm3", {"no_rope_layers": [1, 0]}),
    *[(kind, {}) for kind in ("cohere", "gptj")],  # neighbours are pairs
    ("llama", {"max_position_embeddings": 2**17, "head_dim": 64, "rope_parameters": {"rope_theta": 5e5}}),
]


def cached(runner: ModelRunner, start: int) -> list[Tensor]:
    """Keys of every layer that the model itself computes for a text that starts at a position."""
    ids = torch.tensor([[5, 9, 11, 7, 30], [4, 6, 8, 3, 40]])
    cache = runner.new_cache()
    runner.model(ids, position_ids=torch.arange(start, start + 5)[None].expand(2, -1), past_key_values=cache)
    return [layer.keys for layer in cache.layers]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "fields"), CASES)
def test_moved_keys_are_those_of_the_other_positions(kind: str, fields: dict[str, Any]) -> None:
    """Up and down, in float64 but for the rotary angles, which transformers computes in float32."""
    runner = ModelRunner(tiny_model(kind, **fields).double())
    mover, far = KeyMover(runner), min(3000, runner.max_positions - 5)
    assert mover.kind == "rotary"
    one, other = cached(runner, 2), cached(runner, far)
    assert any(not torch.allclose(*pair, atol=0.1) for pair in zip(one, other, strict=True)), "there is something to do"
    for layer, (low, high) in enumerate(zip(one, other, strict=True)):
        scale = 2e-4 * float(low.abs().max())
        assert torch.allclose(mover.move(low, layer, torch.tensor(far - 2)), high, rtol=0, atol=scale)
        assert torch.allclose(mover.move(high, layer, torch.tensor(2 - far)), low, rtol=0, atol=scale)
        # Every entry by an offset of its own: all to the position of the third.
        offsets = torch.tensor([2, 1, 0, -1, -2])
        same = mover.move(mover.move(low, layer, offsets), layer, -offsets)
        assert torch.allclose(same, low, rtol=0, atol=1e-12)
        third = mover.move(high, layer, offsets)[:, :, 1]
        assert torch.allclose(third, mover.move(high[:, :, 1], layer, torch.tensor(1)), rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt2", "opt", "bloom", "mpt", "bart"])
def test_keys_without_rotary_positions_stay(kind: str) -> None:
    """Learned positions are part of the hidden states, and a bias by distance is not in the keys."""
    runner = ModelRunner(tiny_model(kind))
    mover, keys = KeyMover(runner), torch.randn(1, 4, 3, 8)
    assert mover.kind == "none"
    assert torch.equal(mover.move(keys, 0, torch.tensor([5, 6, 7])), keys)


@torch.no_grad()
def test_large_biases_hide_nothing() -> None:
    """As in published Qwen2 models: some keys are a hundred times as large as others, and the same for all tokens."""
    slow = {"rope_type": "default", "rope_theta": 1e10}  # the large ones turn too slowly to be seen
    model = tiny_model("qwen2", max_position_embeddings=8192, rope_parameters=slow)
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.view(-1, 8)[:, [3, 7]] = torch.tensor([300.0, -200.0])
    runner = ModelRunner(model)
    mover = KeyMover(runner)
    assert mover.kind == "rotary"
    for layer, (low, high) in enumerate(zip(cached(runner, 0), cached(runner, 100), strict=True)):
        moved = mover.move(low, layer, torch.tensor(100))
        for part in ([0, 1, 2, 4, 5, 6], [3, 7]):
            assert torch.allclose(
                moved[..., part], high[..., part], rtol=0, atol=1e-4 * float(high[..., part].abs().max())
            )


def test_low_precision() -> None:
    """Within the rounding of bfloat16."""
    runner = ModelRunner(tiny_model("llama", max_position_embeddings=8192).bfloat16())
    mover = KeyMover(runner)
    with torch.no_grad():
        for layer, (low, high) in enumerate(zip(cached(runner, 0), cached(runner, 1000), strict=True)):
            moved = mover.move(low, layer, torch.tensor(1000))
            assert moved.dtype == torch.bfloat16
            assert float((moved - high).float().norm()) < 0.03 * float(high.float().norm())


def test_keys_that_are_placed_in_another_way_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = ModelRunner(tiny_model("llama"))
    forward = runner.model.model.rotary_emb.forward

    def shrinking(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = forward(x, position_ids)
        smaller = 0.99 ** position_ids[..., None]
        return cos * smaller, sin * smaller

    monkeypatch.setattr(runner.model.model.rotary_emb, "forward", shrinking)
    with pytest.raises(GradmemError, match=r"'llama' cannot be moved .* by more than a rotation"):
        KeyMover(runner)


def test_positions_that_cannot_be_given_are_refused() -> None:
    """A model that rotates its keys by positions that it only counts for itself."""
    with pytest.raises(GradmemError, match=r"'moss_transcribe_diarize' cannot be moved .* accepts no position ids"):
        KeyMover(ModelRunner(tiny_model("moss_transcribe_diarize")))


def test_positions_that_are_kept_beside_the_keys_are_refused() -> None:
    """Latent attention caches a vector for keys and values together, and the rotated part by itself."""
    with pytest.raises(GradmemError, match=r"'deepseek_v3' cannot be moved .* beside its keys"):
        KeyMover(ModelRunner(tiny_model("deepseek_v3")))
