"""Tiny float64 models and random batches that the tests share."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gradmem
import standin  # noqa: F401 - makes its device known before anything is differentiated
from gradmem.backbone import Backbone
from gradmem.batch import Batch, Tokens
from gradmem.errors import GradmemError
from gradmem.memory import Memory
from gradmem.methods import GradMem, Method
from gradmem.model import BoundMemory, MemoryModel
from naive import Naive, rms_norm

torch.set_num_threads(1)

M = TypeVar("M", bound=Method)

VOCABULARY = 23
COMMON = {
    "vocab_size": VOCABULARY,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.3,
}
WIDE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 40}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_inner": 24, "n_layer": 2, "n_head": 2, "n_positions": 40}
    | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    "gpt_neox": WIDE | {"num_attention_heads": 2},
    # Grouped-query heads, and tied and untied output layers.
    "llama": WIDE | {"num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen2": WIDE | {"num_attention_heads": 4, "num_key_value_heads": 1, "tie_word_embeddings": True},
}
KINDS = list(CONFIGS)
ROOT = Path(__file__).parents[1]
"""The repository."""
SHARED = ROOT.parent / "shared"
"""Data and fixtures that are no part of it."""
DATA = Path(os.environ.get("GRADMEM_DATA_DIR") or SHARED / "data")
"""Data sets that are no part of the repository; tests that need them are skipped where they are not."""
TOLERANCE = 1e-10
"""Of what is computed in float64 throughout."""


TINY_LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
}
"""A backbone that takes any text of a few sentences."""
TINY_GRADMEM = {"name": "gradmem", "n_mem": 2, "write_steps": 1, "write_head": "random"}


def needs(*names: str) -> pytest.MarkDecorator:
    """Skip a test where a data set is absent."""
    absent = [name for name in names if not (DATA / name).exists()]
    return pytest.mark.skipif(bool(absent), reason=f"{DATA} has no {', '.join(absent)}; see GRADMEM_DATA_DIR")


def make_gradmem(kind: str = "gpt2", *, config: dict[str, Any] | None = None, **options: Any) -> GradMem:
    """Build a GradMem; see `make_method`."""
    return make_method(GradMem, kind, config=config, **{"n_mem": 3, "inner_lr": 0.3, "write_steps": 2} | options)


def make_method(cls: type[M], kind: str = "gpt2", *, config: dict[str, Any] | None = None, **options: Any) -> M:
    """Build a method in float64, always the same; no parameter is zero or the identity."""
    fields = {"model_type": kind} | COMMON | CONFIGS.get(kind, {}) | (config or {})
    built, state = _backbone(json.dumps(fields))
    with torch.random.fork_rng():
        torch.set_rng_state(state)
        backbone = copy.deepcopy(built)
        for module in backbone.modules():
            # Transformers' own is in float32 even in a float64 model.
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = rms_norm.__get__(module)
        method = cls(backbone, **options).double()
        with torch.no_grad():
            for parameter in method.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return method.eval()


@cache
def _backbone(fields: str) -> tuple[Backbone, Tensor]:
    """A backbone and the state of the random numbers after it. To build and try one takes longer than most tests."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Backbone.from_config(json.loads(fields)), torch.get_rng_state()


class Numbers:
    """What methods need of a task, without a tokenizer."""

    pad_id, end_id = 0, 2

    def __init__(self, before_context: list[int] | None = None) -> None:
        self.before_context = before_context or []

    def encode_query(self, text: str) -> list[int]:
        return [7, *(1 + ord(character) % 20 for character in text[:2])]

    def greedy_options(self) -> dict[str, Any]:
        return {"do_sample": False, "eos_token_id": [self.end_id]}


def read_loss(method: Method, batch: Batch) -> Tensor:
    """Write the contexts of a batch, and read its labels."""
    memory = method.write(batch.context).memory
    logits = method.read(memory, batch.queries, batch.rows)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())


@contextmanager
def refused_in_one_line(wanted: str) -> Iterator[None]:
    """Expect a `GradmemError` of one line that says what is wanted."""
    with pytest.raises(GradmemError) as refused:
        yield
    assert wanted in str(refused.value)
    assert "\n" not in str(refused.value)


def saved_and_opened(method: dict[str, Any], directory: Path, layers: int = 1) -> tuple[MemoryModel, BoundMemory]:
    """Save a small model and memories of two texts, and open both; the memories answer as before."""
    torch.manual_seed(0)
    backbone = TINY_LLAMA | {"num_hidden_layers": layers}
    MemoryModel.from_spec({"name": "kv", "pairs": 3}, backbone, method).save_pretrained(directory / "model")
    model = gradmem.load(directory / "model")
    memory = model.write(["a7:Qz\nk2:9f\nzz:aa", "b1:xy\nc2:zz\nd3:aa"])
    memory.save(directory / "memory")
    again = gradmem.open(directory / "memory")
    assert again.ask([["a7"], ["b1"]]) == memory.ask([["a7"], ["b1"]])
    return model, again


def random_tokens(lengths: list[int], seed: int = 0) -> Tokens:
    """Rows of random tokens, padded with random tokens too: only the mask tells them apart."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    return Tokens(ids, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])


def make_batch(seed: int = 0) -> Batch:
    """Three contexts of different lengths; five queries to them that end in one to five target tokens."""
    queries = random_tokens([4, 6, 3, 5, 4], seed + 1)
    labels = queries.ids.masked_fill(~queries.mask, -100)
    for row, begin in enumerate([2, 3, 2, 0, 3]):
        labels[row, :begin] = -100
    return Batch(random_tokens([7, 5, 8], seed), queries, labels, torch.tensor([2, 0, 0, 1, 2]))


def make_later_batch() -> Batch:
    """Make the same batch, but the first token of a query is no target: the published losses leave it out."""
    made = make_batch()
    made.labels[:, 0] = -100
    return made


def real(tokens: Tokens, row: int) -> Tensor:
    """The tokens of a row without its pads."""
    return tokens.ids[row, tokens.mask[row]]


def distance(got: Tensor, wanted: Tensor) -> float:
    """Distance relative to the norm of the wanted tensor."""
    assert got.shape == wanted.shape
    got, wanted = got.detach(), wanted.detach()
    return float((got - wanted).norm() / wanted.norm().clamp_min(1e-300))


def gradients(loss: Tensor, method: Method) -> dict[str, Tensor]:
    """Gradients by parameter name; None becomes zero."""
    named = dict(method.named_parameters())
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), grads, strict=True)}


def assert_same_gradients(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    """Compare each gradient with the wanted one, relative to its norm or to that of the largest."""
    assert got.keys() == wanted.keys()
    largest = max(grad.norm() for grad in wanted.values())
    for name, grad in wanted.items():
        assert (got[name] - grad).norm() <= tolerance * max(grad.norm(), 1e-3 * largest), name


def tiny_model(seed: int) -> MemoryModel:
    """Build an untrained KV model in float32 with 8 memory vectors of width 16."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MemoryModel.from_spec(
            {"name": "kv", "pairs": 3},
            {
                "model_type": "llama",
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "max_position_embeddings": 512,
                "initializer_range": 0.25,
            },
            {"name": "gradmem", "n_mem": 8, "write_steps": 2, "write_head": "random"},
        )


def text_model(task: dict[str, Any]) -> MemoryModel:
    """Build an untrained model of any task, with 2 memory vectors of width 16."""
    torch.manual_seed(0)
    model = MemoryModel.from_spec(task, TINY_LLAMA, TINY_GRADMEM)
    model.method.eval()
    return model


def naive(method: GradMem, **options: Any) -> Naive:
    return Naive(method, **{"inner_lr": 0.3, "write_steps": 2} | options)


def outer_loss(method: GradMem, batch: Batch, auxiliary: float = 0.0) -> tuple[Tensor, Memory]:
    """Mean read loss over all target tokens, plus the last write loss."""
    written = method.write(batch.context)
    logits = method.read(written.memory, batch.queries, batch.rows)[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    if auxiliary and len(written.losses):
        loss = loss + auxiliary * written.losses[-1].mean()
    return loss, written.memory


def slope(loss: Callable[[], Tensor], parameter: Tensor, direction: Tensor, h: float) -> float:
    """Central difference of a loss along a direction of a parameter."""
    with torch.no_grad():
        parameter.add_(h * direction)
        above = loss()
        parameter.sub_(2 * h * direction)
        below = loss()
        parameter.add_(h * direction)
    return float((above - below) / (2 * h))


def check_slopes(method: GradMem, loss: Callable[[], Tensor], names: set[str] = frozenset(), h: float = 1e-5) -> None:
    """Compare every gradient, or those of the parameters named, with a slope along a random direction."""
    grads = gradients(loss(), method)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in method.named_parameters():
        if names and name not in names:
            continue
        direction = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        got = slope(loss, parameter, direction / direction.norm(), h)
        wanted = (grads[name] * direction).sum() / direction.norm()
        assert grads[name].any(), name
        assert got == pytest.approx(wanted.item(), abs=1e-6 * float(grads[name].norm()) + 1e-9), name


MODES = ["sequential", "independent", "joint"]
SIZE = 3
"""Of the chunks of `make_batch`, whose contexts have then three, two and three of them."""


def chunked(mode: str, kind: str = "gpt2", **options: Any) -> GradMem:
    return make_gradmem(kind, chunk_size=SIZE, chunk_mode=mode, **options)
