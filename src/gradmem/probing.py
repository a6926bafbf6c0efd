"""What a language model does with embeddings, a cache and pads: found out by running it on a few vectors.

A model is accepted by what it computes, not by its name. Errors are compared with how far another memory moves the
logits, so that they also show in models with small weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from .errors import GradmemError
from .model_runner import ModelRunner
from .ops.head import Head, ScaledHead
from .prefix import Prefix

FAILURES = (
    AssertionError,
    AttributeError,
    ImportError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a model raises that cannot run in this way."""
MEMORY, QUERY = 3, 4
"""Memory vectors and query tokens of a probe."""
NEW = 2
"""Tokens that a probe generates."""
PART = 0.02
"""Largest error, as a share of what another memory changes."""


def find_head(runner: ModelRunner) -> Head:
    """Find the output layer, and the scale and cap that the model applies to its logits.

    The layer's output is replaced by known numbers, so that the size of the weights does not matter.

    Raises
    ------
    GradmemError
        If the model has no output layer, does not apply it to its last hidden states, or changes the logits other than
        by a scale and a cap.
    """
    model, layer = runner.model, runner.model.get_output_embeddings()
    embeds = _vectors(runner)[:1, :1]
    if layer is None:
        raise GradmemError("it has no output layer")
    known = torch.linspace(-60, 60, layer.weight.shape[0], device=embeds.device)
    known[0], known[-1] = 2.0**-10, 2.0**15
    inputs: list[Tensor] = []

    def replace(module: Any, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inputs.append(given[0])
        return known.expand_as(output)

    hook = layer.register_forward_hook(replace)
    try:
        logits = model(inputs_embeds=embeds, use_cache=False, return_dict=True).logits[0, -1]
    finally:
        hook.remove()
    if not inputs:
        raise GradmemError("it does not call its output layer")
    found, exact = logits.float(), max(1e-3, torch.finfo(logits.dtype).eps)
    hidden = runner.hidden(embeds)[0, -1].float()
    before = _factor(hidden, inputs[-1].flatten(0, -2)[-1].float(), layer.bias is None)
    scale = float(found[0] / known[0])
    scale = 1.0 if abs(scale - 1) < 1e-5 else scale
    straight = abs(float(found[-1]) - scale * float(known[-1])) <= exact * abs(scale * float(known[-1]))
    head = ScaledHead(layer, scale, None if straight else float(found[-1]))
    if not torch.allclose(head.finish(known), found, rtol=exact, atol=1e-5):
        raise GradmemError("it changes its logits after the output layer")
    head = ScaledHead(layer, before * scale, head.cap)
    return layer if head.cap is None and head.scale == 1 else head


def _factor(hidden: Tensor, given: Tensor, scales: bool) -> float:
    """The factor that hidden states are multiplied by before the output layer."""
    factor = float(given @ hidden / (hidden @ hidden).clamp_min(1e-30)) if scales else 1.0
    factor = 1.0 if abs(factor - 1) < 1e-4 else factor
    if not torch.allclose(factor * hidden, given, rtol=1e-2, atol=1e-2 * float(given.abs().max())):
        raise GradmemError("it changes its last hidden states before the output layer")
    return factor


def other_layers(runner: ModelRunner) -> list[str]:
    """Kinds of layers that keep something else than keys and values, sorted."""
    layers = map(type, DynamicCache(config=runner.model.config).layers)
    return sorted({layer.__name__ for layer in layers if layer not in (DynamicLayer, DynamicSlidingWindowLayer)})


def check_reading(runner: ModelRunner) -> float:
    """Compare READ and generation after a prefix in the cache with single passes over memory, query and answer.

    Returns
    -------
    float
        How far another memory moves the logits; 0 if no further than rounding does.

    Raises
    ------
    GradmemError
        If they differ.
    """
    vectors, query = _vectors(runner), _tokens(runner)
    prefix = runner.prefix(vectors)
    kept = {layer.get_seq_length() for layer in prefix.cache.layers}
    if kept != {MEMORY}:
        raise GradmemError("it does not keep the memory in the cache")
    embeds = runner.embed(torch.tensor(query, device=vectors.device))
    one, other = (_whole(runner, memory, embeds) for memory in vectors)
    moved = 0.0 if _near(one, other, 0.0) else float((one - other).abs().max())
    if wrong := _wrong(runner, prefix, list(vectors), [query, query], moved):
        raise GradmemError(wrong)
    return moved


def hides_pads(runner: ModelRunner, moved: float) -> bool:
    """Whether masked pads change nothing, both after a shorter prefix and before a shorter query."""
    vectors, query = _vectors(runner), _tokens(runner)
    real = torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device)
    real[1, -1] = False
    try:
        prefix = runner.prefix(vectors, real)
        return not _wrong(runner, prefix, [vectors[0], vectors[1, :-1]], [query, query[:2]], moved)
    except FAILURES:
        return False


def obeys_masks(runner: ModelRunner) -> bool:
    """Whether the model obeys attention masks of shape (batch, 1, length, length) and position ids."""
    vectors = _vectors(runner)[:1]
    kept = torch.tensor([0, 2], device=vectors.device)
    seen = torch.ones(3, 3, dtype=torch.bool, device=vectors.device).tril()
    seen[2, 1] = False
    mask = torch.zeros(1, 1, 3, 3, dtype=vectors.dtype, device=vectors.device)
    mask = mask.masked_fill(~seen, torch.finfo(vectors.dtype).min)
    positions = torch.tensor([[0, 1, 1]], device=vectors.device)
    try:
        with torch.no_grad(), runner.without_dropout():
            found = runner.hidden(vectors, mask=mask, positions=positions)[0, 2]
            wanted = runner.hidden(vectors[:, kept])[0, 1]
            other = runner.hidden(vectors)[0, 2]
    except FAILURES:
        return False
    return _near(found, wanted, float((wanted - other).abs().max()))


def _wrong(
    runner: ModelRunner, prefix: Prefix, memories: list[Tensor], queries: list[list[int]], moved: float
) -> str | None:
    """What READ or generation after a prefix does wrong, compared with a pass over each row alone; None if nothing."""
    device, length = prefix.last.device, max(map(len, queries))
    same = prefix.select(torch.arange(len(queries), device=device))
    inputs = same.generation_inputs(queries, 0, positions=runner.takes_positions)
    made = runner.generate(
        **inputs, max_new_tokens=NEW, pad_token_id=0, return_dict_in_generate=True, output_logits=True
    )
    tokens = torch.zeros(len(queries), length + NEW, dtype=torch.long, device=device)
    for row, query in enumerate(queries):
        tokens[row, : len(query) + NEW] = torch.cat([torch.tensor(query, device=device), made.sequences[row, -NEW:]])
    embeds, generated = runner.embed(tokens), torch.stack(made.logits, 1)
    read = runner.head(runner.hidden(embeds, prefix.cache, **prefix.continued(length + NEW)))
    for row, query in enumerate(queries):
        end = len(query) + NEW
        wanted = _whole(runner, memories[row], embeds[row, :end])
        if not _near(read[row, :end], wanted, moved):
            return "with the memory in the cache it computes something else than in one pass"
        if not _near(generated[row], wanted[end - 1 - NEW : end - 1], moved):
            return "it generates something else than it computes in one pass"
    return None


def _whole(runner: ModelRunner, vectors: Tensor, embeds: Tensor) -> Tensor:
    """The model's own logits of tokens after memory vectors, in one pass."""
    given = torch.cat([vectors, embeds])[None]
    logits: Tensor = runner.model(inputs_embeds=given, use_cache=False, return_dict=True).logits
    return logits[0, -len(embeds) :]


def _near(found: Tensor, wanted: Tensor, moved: float) -> bool:
    """Whether the error is small compared with what another memory changes, or within rounding."""
    rounding = torch.finfo(wanted.dtype).eps ** 0.75 * float(wanted.abs().max())
    return float((found.float() - wanted.float()).abs().max()) <= max(PART * moved, rounding)


def _vectors(runner: ModelRunner) -> Tensor:
    """Two memories, shape (2, MEMORY, d): each vector a mean of two embeddings, as some models look up tokens."""
    count = runner.model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(4 * MEMORY, device=runner.model.device) % count
    return runner.embed(ids).detach().view(2, 2, MEMORY, -1).mean(0)


def _tokens(runner: ModelRunner) -> list[int]:
    """Token ids of the query."""
    count = runner.model.get_input_embeddings().weight.shape[0]
    return [(3 + 5 * i) % count for i in range(QUERY)]
