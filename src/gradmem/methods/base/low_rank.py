"""A memory that changes the model's weights: matrices of low rank, of each sample's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...backbone import Backbone
from ...errors import GradmemError
from ...inner.optimizers import Tensors
from ...prefix import Prefix
from .chunks import pad_rows
from .form import Form
from .state_prefix import StatePrefix

Placement = Literal["between_layers", "target_modules"]


class LowRank(Form):
    """Matrices A and B of rank r at several places of the model: they add `alpha / r * x A B` for every token.

    The places are the outputs of layers, where x is the output itself (`between_layers`), or linear modules in layers,
    where x is the input (`target_modules`). The memory takes no positions.

    The tensors of a place are `PLACE_A`, shape (batch, in, r), and `PLACE_B`, shape (batch, r, out), where PLACE is
    `layer0` or, for example, `layer0_self_attn_q_proj`.

    Parameters
    ----------
    backbone : Backbone
    rank : int
    alpha : float
    placement : {"between_layers", "target_modules"}
    layers : str or int
        `all`, `last_N`, or numbers of layers separated by commas.
    targets : str, optional
        Endings of the modules' names, separated by commas; by default all linear modules of the layers.
    begin : bool
        As for `Form`.

    Raises
    ------
    GradmemError
        If there is no such layer or module.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        rank: int,
        alpha: float,
        placement: Placement,
        layers: str | int,
        targets: str | None,
        begin: bool,
    ) -> None:
        super().__init__(backbone, begin)
        self.scale, self.inside = alpha / rank, placement == "target_modules"
        numbers, blocks = _layer_numbers(layers, len(backbone.blocks)), backbone.blocks
        self.places: dict[str, tuple[int, str]] = {f"layer{number}": (number, "") for number in numbers}
        sizes = dict.fromkeys(self.places, (backbone.width, backbone.width))
        if self.inside:
            found = {
                f"layer{number}_{name.replace('.', '_')}": (number, name, size)
                for number in numbers
                for name, size in _linear_modules(blocks[number], targets)
            }
            self.places = {place: (number, name) for place, (number, name, _) in found.items()}
            sizes = {place: size for place, (_, _, size) in found.items()}
        like = backbone.model.get_input_embeddings().weight
        kept: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        for place, (inner, outer) in sizes.items():
            # As published: the bound follows the rank, not the width.
            drawn = torch.empty(inner, rank, **kept).uniform_(-(rank**-0.5), rank**-0.5)
            self.initial[f"{place}_A"] = nn.Parameter(drawn)
            self.initial[f"{place}_B"] = nn.Parameter(torch.zeros(rank, outer, **kept))
        with torch.no_grad(), backbone.without_dropout():
            self.run(backbone, self.start(2), backbone.embed(torch.zeros(2, 1, dtype=torch.long, device=like.device)))

    def rate_shapes(self) -> dict[str, tuple[int, ...]]:
        """One rate for each matrix."""
        return dict.fromkeys(self.initial, (1, 1))

    def run(self, backbone: Backbone, tensors: Tensors, embeds: Tensor) -> Tensor:
        """Run embeddings through the changed model; see `Form.run`."""
        with self.active(backbone, {name: tensor[:, None] for name, tensor in tensors.items()}):
            return backbone.hidden(embeds)

    def prefix(self, backbone: Backbone, tensors: Tensors, counts: Tensor | None = None) -> Prefix:
        """Build a prefix that changes the model while it is active; see `Form.prefix`. Changes of a row add up."""
        counts = torch.ones(len(next(iter(tensors.values()))), dtype=torch.long) if counts is None else counts
        state = {name: pad_rows(tensor, counts) for name, tensor in tensors.items()}
        cache, activate = backbone.new_cache(), partial(self.active, backbone)
        if self.begin is None:
            last = next(iter(self.initial.values())).new_zeros(len(counts), backbone.width)
        else:
            with activate(state):
                last = backbone.hidden(self._begins(len(counts)), cache)[:, -1]
        return StatePrefix(state, last, cache, activate)

    @contextmanager
    def active(self, backbone: Backbone, state: Tensors) -> Iterator[None]:
        """Change the model within a context.

        Parameters
        ----------
        backbone : Backbone
        state : dict of Tensor, shapes (batch, memories, ...)
            Memories that each row reads together, padded with zeros.
        """
        with ExitStack() as stack:
            for place, (number, name) in self.places.items():
                a = self._own(state, f"{place}_A").transpose(1, 2).flatten(2)
                b = self._own(state, f"{place}_B").flatten(1, 2)
                module = backbone.blocks[number].get_submodule(name)
                stack.enter_context(module.register_forward_hook(_adder(a, self.scale * b, self.inside)))
            yield


def _adder(a: Tensor, b: Tensor, inside: bool) -> Callable[..., Any]:
    """Build a hook that adds x A B to the output of a module; x is its input if `inside`, else the output itself."""

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        x = inputs[0] if inside else first
        if x.dim() != 3 or len(x) != len(a):
            raise GradmemError("a module of the layers mixes samples, such as experts do: name others in lora_targets")
        changed = first + (x @ a @ b).to(first.dtype)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook


def _layer_numbers(layers: str | int, count: int) -> list[int]:
    """The numbers of the layers that a text names, of `count` layers."""
    text = str(layers).strip()
    if text == "all":
        return list(range(count))
    last = text.removeprefix("last_")
    parts = [part.strip() for part in last.split(",")]
    if all(part.isdecimal() for part in parts) and (last == text or len(parts) == 1):
        numbers = sorted(set(map(int, parts)))
        if last != text and 1 <= numbers[0] <= count:
            return list(range(count - numbers[0], count))
        if last == text and numbers[-1] < count:
            return numbers
    raise GradmemError(
        f"lora_layers must be all, last_N or numbers from 0 to {count - 1} such as 0,{count - 1}, not {layers!r}"
    )


def _linear_modules(block: nn.Module, targets: str | None) -> list[tuple[str, tuple[int, int]]]:
    """Names of the linear modules of a layer that are targets, with the sizes of their inputs and outputs."""
    # With LoRA, a linear module is inside of a wrapper that has its name.
    linear = {
        name.removesuffix(".base_layer"): tuple(module.weight.shape)
        if isinstance(module, Conv1D)
        else (module.in_features, module.out_features)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and "lora_" not in name
    }
    wanted = [""] if targets is None else [target.strip() for target in targets.split(",")]
    for target in wanted:
        if not any(name.endswith(target) for name in linear) or (targets is not None and not target):
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
            raise GradmemError(f"lora_targets: no linear module is called {target!r}; there are {known}")
    return [(name, size) for name, size in linear.items() if any(name.endswith(target) for target in wanted)]
