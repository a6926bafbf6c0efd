"""Closed-form attention against plain softmax attention, finite differences and whole models with eager attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gradmem.errors import GradmemError
from gradmem.ops import attention as module
from gradmem.ops import attention_tiles
from gradmem.ops.attention import NAME, attention
from helpers import COMMON, CONFIGS, KINDS, VOCABULARY, WIDE, distance, make_batch, make_gradmem
from naive import attention as plain_attention

SCALING = 0.4
EAGER = {kind: 1e-9 if kind == "gpt2" else 1e-5 for kind in KINDS}
"""Agreement with transformers' eager attention, whose softmax is in float32 even in a float64 model; not in GPT-2."""


def naive(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, causal: bool = True) -> Tensor:
    return plain_attention(query, key, value, SCALING, mask, causal)


def derivatives(function: Callable[..., Tensor], inputs: list[Tensor], seed: int = 1) -> list[Tensor]:
    """Output, gradient, and derivative of a function of both, with respect to the inputs."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    out = function(*inputs)

    def like(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)

    first = torch.autograd.grad((out * like(out)).sum() + (out**2).sum(), inputs, create_graph=True)
    total = sum((grad * like(grad)).sum() + (grad**2).sum() for grad in first) + (out**3).sum()
    return [out, *first, *torch.autograd.grad(total, inputs)]


def padding(left: bool) -> Tensor:
    """The causal mask of three samples of 11, 7 and 9 tokens; each pad sees itself, so that no row is empty."""
    position = torch.arange(11)
    lengths = torch.tensor([11, 7, 9])[:, None]
    real = position >= 11 - lengths if left else position < lengths
    causal = position <= position[:, None]
    return (causal & real[:, None] | torch.eye(11, dtype=torch.bool))[:, None]


def window(size: int) -> Tensor:
    position = torch.arange(11)
    return ((position <= position[:, None]) & (position > position[:, None] - size))[None, None]


def random_mask(*shape: int) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.5) | torch.eye(*shape[2:]).bool()


# Heads, key heads, queries, keys, mask, causal.
CASES: dict[str, tuple[int, int, int, int, Tensor | None, bool]] = {
    "causal": (2, 2, 11, 11, None, True),
    "prefix": (2, 2, 5, 11, None, True),
    "one_query": (2, 2, 1, 11, None, True),
    "one_token": (2, 2, 1, 1, None, True),
    "groups": (4, 2, 11, 11, None, True),
    "groups_prefix": (6, 2, 7, 11, None, True),
    "one_key_head": (4, 1, 11, 11, None, True),
    "one_head": (1, 1, 11, 11, None, True),
    "bidirectional": (2, 2, 11, 11, None, False),
    "cross": (2, 2, 11, 6, None, False),
    "right_padding": (2, 2, 11, 11, padding(left=False), True),
    "left_padding": (2, 2, 11, 11, padding(left=True), True),
    "left_padding_groups": (4, 2, 11, 11, padding(left=True), True),
    "window": (4, 2, 11, 11, window(3), True),
    "mask_by_head": (4, 2, 7, 11, random_mask(3, 4, 7, 11), True),
    "mask_of_all": (4, 2, 7, 11, random_mask(1, 4, 7, 11), True),
    "bias": (4, 2, 7, 11, random_mask(3, 4, 7, 11).double().log().clamp_min(-3), True),
    "minus_infinity": (4, 2, 11, 11, padding(left=True).double().log(), True),
}


@pytest.fixture(params=["one_tile", "tiles", "head_tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run on a single tile, on tiles of 4 rows and two samples, or on tiles of 4 rows and one head."""
    if request.param != "one_tile":
        monkeypatch.setattr(attention_tiles, "TILE_ROWS", 4)
        monkeypatch.setattr(attention_tiles, "TILE_BYTES", 4 * 11 * 8 * (4 if request.param == "tiles" else 1))
    return request.param


def make_inputs(name: str, dtype: torch.dtype = torch.float64, width: int = 5) -> list[Tensor]:
    """Query, key and value of a case, laid out as models do: heads behind positions."""
    heads, key_heads, queries, keys, _, _ = CASES[name]
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, queries, heads, 4), (3, keys, key_heads, 4), (3, keys, key_heads, width)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2) for s in shapes]


def ours(name: str) -> Callable[..., Tensor]:
    *_, mask, causal = CASES[name]
    return lambda q, k, v: attention(q, k, v, scaling=SCALING, mask=mask, causal=causal)


def theirs(name: str) -> Callable[..., Tensor]:
    *_, mask, causal = CASES[name]
    return lambda q, k, v: naive(q, k, v, mask, causal)


@pytest.mark.parametrize("name", CASES)
def test_values_and_derivatives(name: str, tiles: str) -> None:
    inputs = make_inputs(name)
    for got, wanted in zip(derivatives(ours(name), inputs), derivatives(theirs(name), inputs), strict=True):
        # One token alone: its weight is 1, and its query and key have no gradient.
        assert (got - wanted).norm() < 1e-13 * wanted.norm() + 1e-14


@pytest.mark.parametrize("name", ["causal", "groups_prefix", "left_padding", "mask_by_head"])
def test_finite_differences(name: str, tiles: str) -> None:
    inputs = [tensor[:1, :, :6, :2].clone().requires_grad_() for tensor in make_inputs(name)]
    *_, mask, causal = CASES[name]
    if mask is not None:
        mask = mask[:1, :, : inputs[0].shape[2], : inputs[1].shape[2]]

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, scaling=SCALING, mask=mask, causal=causal)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_third_derivative_is_refused() -> None:
    inputs = [tensor.requires_grad_() for tensor in make_inputs("causal")]
    out = ours("causal")(*inputs)
    for _ in range(2):
        out = torch.autograd.grad((out**2).sum(), inputs[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no third derivative"):
        torch.autograd.grad((out**2).sum(), inputs[0])


def test_no_gradient_for_some_inputs() -> None:
    """What needs no gradient gets none, and the others are as before."""
    query, key, value = make_inputs("groups")
    wanted = derivatives(lambda q: naive(q, key, value), [query])
    for got, want in zip(derivatives(lambda q: ours("groups")(q, key, value), [query]), wanted, strict=True):
        assert distance(got, want) < 1e-13
    with torch.no_grad():
        assert distance(ours("groups")(query, key, value), wanted[0]) < 1e-13


@pytest.mark.parametrize("name", ["causal", "groups_prefix", "left_padding"])
def test_float32(name: str, tiles: str) -> None:
    wanted = derivatives(theirs(name), make_inputs(name))
    for got, want in zip(derivatives(ours(name), make_inputs(name, torch.float32)), wanted, strict=True):
        assert got.dtype == torch.float32
        assert distance(got.double(), want) < 1e-5


@pytest.mark.parametrize("name", ["causal", "groups_prefix", "left_padding"])
def test_autocast(name: str, tiles: str) -> None:
    """Under bfloat16 autocast, no further from the truth than eager attention with a float32 softmax."""
    heads, key_heads, *_, mask, _ = CASES[name]
    inputs = make_inputs(name, torch.float32)
    wanted = derivatives(theirs(name), inputs)

    def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        groups = heads // key_heads
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        hidden = naive_mask(query, key) if mask is None else mask
        scores = (query @ key.mT) * SCALING + torch.zeros(hidden.shape).masked_fill(~hidden, -1e30)
        return (scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value).transpose(1, 2)

    # Rotary embedding hands over float32 queries and keys beside bfloat16 values.
    mixed = [inputs[0], inputs[1], inputs[2].bfloat16()]
    with torch.autocast("cpu", torch.bfloat16):
        got = derivatives(ours(name), mixed)
        reference = derivatives(eager, mixed)
    assert got[0].dtype == torch.bfloat16
    assert [tensor.dtype for tensor in got[1:4]] == [tensor.dtype for tensor in mixed]
    for mine, other, want in zip(got, reference, wanted, strict=True):
        assert distance(mine.float(), want) < max(0.02, 1.5 * distance(other.float(), want))


def naive_mask(query: Tensor, key: Tensor) -> Tensor:
    queries, keys = query.shape[2], key.shape[2]
    return (torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries)[None, None]


def test_autocast_leaves_float64() -> None:
    inputs = make_inputs("causal")
    with torch.autocast("cpu", torch.bfloat16):
        assert distance(ours("causal")(*inputs), naive(*inputs)) < 1e-13


def test_expanded_inputs_and_empty_batches() -> None:
    """Gradients that `sum` expands, keys that a batch shares, and no sample at all."""
    query, key, value = make_inputs("causal")
    shared = [tensor[:1].expand(3, -1, -1, -1) for tensor in (key, value)]
    query.requires_grad_()
    (wanted,), (got,) = (torch.autograd.grad(f(query, *shared).sum(), query) for f in (naive, ours("causal")))
    assert distance(got, wanted) < 1e-12
    results = derivatives(ours("causal"), [tensor[:0] for tensor in (query, key, value)])
    assert [tensor.shape[0] for tensor in results] == [0] * 7


def test_large_scores() -> None:
    """Scores beyond the range of the exponential stay finite."""
    inputs = make_inputs("causal")
    inputs[0] = inputs[0] * 1e4
    for got, wanted in zip(derivatives(ours("causal"), inputs), derivatives(theirs("causal"), inputs), strict=True):
        assert got.isfinite().all()
        assert (got - wanted).norm() <= 1e-9 * wanted.norm() + 1e-12


def test_row_without_keys_is_finite() -> None:
    inputs = make_inputs("causal")
    mask = torch.ones(3, 1, 11, 11, dtype=torch.bool).tril()
    mask[:, :, :2] = False
    results = derivatives(lambda q, k, v: attention(q, k, v, scaling=SCALING, mask=mask), inputs)
    assert all(tensor.isfinite().all() for tensor in results)
    mean = inputs[2].mean(2)
    assert torch.allclose(results[0][:, 0], mean)


def test_no_matrix_is_kept() -> None:
    """Between the passes only tensors of queries and keys are kept, none of queries times keys."""
    length, sizes = 96, []
    inputs = [torch.randn(1, length, 1, 4).transpose(1, 2).requires_grad_() for _ in range(3)]

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(max(tensor.numel(), tensor.untyped_storage().nbytes() // tensor.element_size()))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = attention(*inputs, scaling=SCALING)
        first = torch.autograd.grad((out**2).sum(), inputs, create_graph=True)
        torch.autograd.grad(sum((grad**2).sum() for grad in first), inputs)
    assert sizes
    assert max(sizes) <= length * 4


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(3, 11, dtype=torch.bool), "does not fit"),
        (torch.ones(3, 1, 11, 10, dtype=torch.bool), "does not fit"),
        (torch.ones(2, 1, 11, 11, dtype=torch.bool), "does not fit"),
        (torch.ones(3, 1, 11, 11, dtype=torch.long), "boolean"),
        (torch.zeros(3, 1, 11, 11, requires_grad=True), "no gradient"),
    ],
)
def test_bad_masks(mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(*make_inputs("causal"), scaling=SCALING, mask=mask)


def test_bad_shapes() -> None:
    query, key, value = make_inputs("causal")
    with pytest.raises(ValueError, match="causal queries"):
        attention(query, key[:, :, :5], value[:, :, :5], scaling=SCALING)
    with pytest.raises(ValueError, match="share"):
        attention(query[:, :1], key, value, scaling=SCALING)


# Whole models


def make_model(kind: str, attn: str = NAME, dtype: torch.dtype = torch.float64, **config: Any) -> PreTrainedModel:
    """The same model for both implementations."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = AutoConfig.for_model(kind, **COMMON | CONFIGS.get(kind, WIDE) | config)
        model = AutoModelForCausalLM.from_config(built, attn_implementation="eager").to(dtype).eval()
    model.set_attn_implementation(attn)
    assert model.config._attn_implementation == attn
    return model


def both(kind: str, **config: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    return make_model(kind, **config), make_model(kind, "eager", **config)


IDS = torch.randint(VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(5))
LEFT = torch.arange(12) >= torch.tensor([0, 5, 2])[:, None]


@pytest.mark.parametrize("kind", KINDS)
def test_models_are_causal(kind: str) -> None:
    """A future token changes nothing before it, alone or in several, with and without a cache."""
    model = make_model(kind)
    changed = IDS.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % VOCABULARY
    for options in ({"use_cache": False}, {"use_cache": True}, {"attention_mask": torch.ones_like(IDS)}):
        before, after = model(IDS, **options).logits, model(changed, **options).logits
        assert torch.equal(before[:, :7], after[:, :7])
        assert (before[:, 7:] != after[:, 7:]).any(-1).all()
    prefix = model(IDS[:, :4], use_cache=True).past_key_values
    rest = model(IDS[:, 4:9], past_key_values=prefix).logits
    assert distance(rest, model(IDS).logits[:, 4:9]) < EAGER[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_models_agree_with_eager(kind: str, side: str) -> None:
    mask = {"none": torch.ones_like(LEFT), "left": LEFT, "right": LEFT.flip(1)}[side]
    # Eager attention gives NaN for left pads in float64: it rounds the mask's most negative number to float32.
    dtype, tolerance = (torch.float32, 1e-5) if side == "left" else (torch.float64, EAGER[kind])
    mine, eager = both(kind, dtype=dtype)
    got = [model(IDS, attention_mask=mask.long()).logits[mask] for model in (mine, eager)]
    assert distance(*got) < tolerance
    for logits in got:
        (logits**2).sum().backward()
    for parameter, wanted in zip(mine.parameters(), eager.parameters(), strict=True):
        assert distance(parameter.grad, wanted.grad) < 10 * tolerance


GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
FUTURE = torch.full((12, 12), -1e9, dtype=torch.float64).triu(2).expand(3, 1, 12, 12)  # one token ahead is seen


@pytest.mark.parametrize(
    ("kind", "config", "inputs", "plain"),
    [
        ("mistral", GROUPED | {"sliding_window": 4}, {}, False),
        ("mistral", GROUPED | {"sliding_window": 40}, {}, True),
        ("llama", {}, {"position_ids": torch.tensor([[*range(5), *range(7)]])}, False),
        ("llama", {"is_causal": False}, {}, False),
        ("llama", {"is_causal": False}, {"attention_mask": LEFT.long()}, False),
        ("llama", {}, {"attention_mask": FUTURE}, False),
    ],
    ids=["window", "long_window", "packed", "bidirectional", "bidirectional_padded", "own_mask"],
)
def test_other_masks(kind: str, config: dict[str, Any], inputs: dict[str, Tensor], plain: bool) -> None:
    mine, eager = both(kind, **config)
    wanted = eager(IDS, **inputs, use_cache=False).logits
    assert distance(mine(IDS, **inputs, use_cache=False).logits, wanted) < 1e-5
    causal = make_model(kind, **config | {"sliding_window": None, "is_causal": True})(IDS).logits
    assert (distance(causal, wanted) < 1e-5) == plain


def test_mask_is_left_out_only_where_causality_is_all() -> None:
    build = AttentionMaskInterface()[NAME]
    square = {"batch_size": 3, "q_length": 12, "kv_length": 12}
    assert build(**square) is None
    assert build(**square, attention_mask=torch.ones_like(LEFT)) is None
    assert build(**square | {"q_length": 4}, q_offset=8) is None
    assert build(**square, local_size=13, mask_function=lambda b, h, q, k: k <= q) is None
    assert build(**square, attention_mask=LEFT) is not None
    assert build(**square, attention_mask=torch.ones(3, 5, dtype=torch.bool)) is not None
    assert build(**square, allow_is_causal_skip=False) is not None
    assert build(**square, local_size=12, mask_function=lambda b, h, q, k: k <= q) is not None
    assert build(**square, mask_function=lambda b, h, q, k: k <= q) is not None
    assert build(**square | {"q_length": 4}, q_offset=3) is not None
    assert build(**square | {"q_length": 4}, q_offset=torch.tensor(8)) is not None
    anywhere = {"mask_function": lambda b, h, q, k: q >= 0, "allow_is_causal_skip": False}
    assert build(**square, **anywhere, allow_is_bidirectional_skip=True).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_generate(kind: str, options: dict[str, Any]) -> None:
    """Left-padded prompts continue with the same tokens as under eager attention."""
    mine, eager = (
        model.generate(IDS, attention_mask=LEFT.long(), max_new_tokens=8, do_sample=False, pad_token_id=0, **options)
        for model in both(kind, dtype=torch.float32)
    )
    assert torch.equal(mine, eager)


@pytest.mark.parametrize("kind", KINDS)
def test_generate_from_memory(kind: str) -> None:
    """Generation on a prefix cache, with queries of different lengths padded behind it."""
    method = make_gradmem(kind)
    batch = make_batch()
    queries = [[3, 1, 4], [1, 5], [9, 2, 6, 5]]
    answers = []
    for name in ("eager", NAME):
        method.backbone.model.set_attn_implementation(name)
        with torch.no_grad():
            memory = method.write(batch.context).memory
        answers.append(method.generate(memory, queries, max_new_tokens=8, do_sample=False))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("kind", KINDS)
def test_meta_gradient(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """WRITE and READ with the gradient through both, against eager attention."""
    monkeypatch.setattr(attention_tiles, "TILE_ROWS", 4)
    batch = make_batch()
    results = []
    for name in ("eager", NAME):
        method = make_gradmem(kind)
        assert method.backbone.double_backward_attention == NAME
        method.backbone.double_backward_attention = name
        written = method.write(batch.context)
        logits = method.read_targets(written.memory, batch)
        loss = F.cross_entropy(logits, batch.labels[batch.labels != -100]) + 0.5 * written.losses[-1].mean()
        loss.backward()
        results.append({name: p.grad for name, p in method.named_parameters() if p.grad is not None} | {"": loss})
    wanted, got = results
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert distance(got[name], wanted[name]) < 10 * EAGER[kind], name


def test_dropout_is_refused() -> None:
    model = make_model("gpt2", attn_pdrop=0.1)
    model(IDS)
    model.train()
    with pytest.raises(GradmemError, match="dropout"):
        model(IDS)


@pytest.mark.parametrize("option", ["softcap", "s_aux", "position_bias"])
def test_unknown_terms_are_refused(option: str) -> None:
    inputs = make_inputs("causal")
    function = module._attention_interface
    with pytest.raises(GradmemError, match=option):
        function(nn.Module(), *inputs, None, **{option: 1.0})
    assert function(nn.Module(), *inputs, None, **{option: None})[0].shape == (3, 11, 2, 5)


def test_module_that_is_not_causal() -> None:
    """Without a mask only a module, or a caller, that says so is bidirectional."""
    inputs, block = make_inputs("causal"), nn.Module()
    scaled = [inputs[0] * SCALING * 2, *inputs[1:]]  # the default scaling is 1 / sqrt(4)
    causal, free = naive(*inputs), naive(*inputs, causal=False)
    assert distance(module._attention_interface(block, *scaled, None)[0], causal) < 1e-13
    assert distance(module._attention_interface(block, *scaled, None, is_causal=False)[0], free) < 1e-13
    block.is_causal = False
    assert distance(module._attention_interface(block, *scaled, None)[0], free) < 1e-13
    assert distance(module._attention_interface(block, *scaled, None, is_causal=True)[0], causal) < 1e-13
