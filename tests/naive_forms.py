"""Memories of keys and values and of low-rank matrices, slow and obvious: one sample, one whole pass, no cache.

Keys and values are put into the matrices of attention itself. Low-rank matrices are added to the weights, or by a layer
that is wrapped for one pass. Only the parameters come from the method under test.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.pytorch_utils import Conv1D

from gradmem.batch import Batch
from naive import Naive, attention

_slots: dict[int, tuple[Tensor, Tensor]] = {}


def _with_slots(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **options: Any
) -> Any:
    keys, values = _slots.get(module.layer_idx, (key[0, :, :0], value[0, :, :0]))
    keys, values = (slots.expand(len(key), *slots.shape) for slots in (keys, values))
    return attention(query, torch.cat([keys, key], 2), torch.cat([values, value], 2), scaling), None


AttentionInterface.register("naive_slots", _with_slots)
AttentionMaskInterface.register("naive_slots", lambda **options: None)


@dataclass
class NaiveForm(Naive):
    """What both forms share: nothing is put before the tokens but a vector that predicts the first one."""

    begin: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def start(self) -> dict[str, Tensor]:
        return dict(self.method.form.initial.items())

    def context_loss(self, written: dict[str, Tensor], context: Tensor) -> Tensor:
        logits = self.forward("write", written, context)
        losses = [-F.log_softmax(logits[t], 0)[token] for t, token in enumerate(context)]
        return sum(losses) / len(losses) if self.begin else sum(losses[1:], 0 * losses[0]) / max(1, len(losses) - 1)

    def loss(self, batch: Batch, auxiliary: float = 0.0) -> tuple[Tensor, list[dict[str, Tensor]]]:
        if not self.begin:
            assert (batch.labels[:, 0] == -100).all()
        return super().loss(batch, auxiliary)

    def forward(self, phase: str, written: dict[str, Tensor], ids: Tensor) -> Tensor:
        """Logits (len(ids) + 1, V); the first are zero if nothing predicts the first token."""
        model = self.method.backbone.model
        embeds = model.get_input_embeddings()(ids)
        if self.begin:
            embeds = torch.cat([self.method.form.begin, embeds])
        hidden = self.hidden(written, embeds[None])[0]
        if phase == "write" and self.write_head != "none":
            logits = hidden @ self.method.write_head.weight.T
        else:
            logits = model.get_output_embeddings()(hidden)
        return logits if self.begin else F.pad(logits, (0, 0, 1, 0))

    def hidden(self, written: dict[str, Tensor], embeds: Tensor) -> Tensor:
        raise NotImplementedError

    def rate(self, name: str, step: int) -> float | Tensor:
        if not self.learn_inner_lr:
            return self.inner_lr
        learned = self.method.log_inner_lr[name]
        return (learned[step - 1] if self.learn_momentum else learned).exp()


class NaiveKeysValues(NaiveForm):
    """Slots stand in the matrices of attention before the keys and values of the tokens."""

    def hidden(self, written: dict[str, Tensor], embeds: Tensor) -> Tensor:
        model = self.method.backbone.model
        for layer in range(len(written) // 2):
            own = [written[f"{kind}_{layer}"] for kind in ("keys", "values")]
            if self.projection == "proj":
                maps = [self.method.form.proj[f"{kind}_{layer}"] for kind in ("keys", "values")]
                own = [slots @ one.weight.T + one.bias for slots, one in zip(own, maps, strict=True)]
            _slots[layer] = tuple(own)
        model.set_attn_implementation("naive_slots")
        first = _slots[0][0].shape[1]
        positions = torch.arange(first, first + embeds.shape[1])[None]
        given = {"inputs_embeds": embeds, "position_ids": positions, "use_cache": False, "output_hidden_states": True}
        hidden = model(**given).hidden_states[-1]
        _slots.clear()  # the model keeps the name of this attention
        return hidden


class NaiveLowRank(NaiveForm):
    """Weights of the sample's own, or layers whose outputs are changed."""

    def hidden(self, written: dict[str, Tensor], embeds: Tensor) -> Tensor:
        model, blocks = self.method.backbone.model, self.method.backbone.blocks
        model.set_attn_implementation("naive")
        scale = self.options.get("lora_alpha", 16.0) / self.options.get("lora_rank", 8)
        weights, names = dict(model.named_parameters()), {module: name for name, module in model.named_modules()}
        given = {"inputs_embeds": embeds, "use_cache": False, "output_hidden_states": True}
        with self.changed(written, scale):
            for number, block in enumerate(blocks):
                for name, module in block.named_modules():
                    place = f"layer{number}_{name.replace('.', '_')}"
                    if name and f"{place}_A" in written:
                        change = scale * written[f"{place}_A"] @ written[f"{place}_B"]
                        leaf = f"{names[module]}.weight"
                        weights[leaf] = weights[leaf] + (change if isinstance(module, Conv1D) else change.T)
            return functional_call(model, weights, (), given, tie_weights=False).hidden_states[-1]

    @contextmanager
    def changed(self, written: dict[str, Tensor], scale: float) -> Iterator[None]:
        """Within the context, the outputs of layers that have matrices are changed."""
        wrapped = []
        for number, block in enumerate(self.method.backbone.blocks):
            if f"layer{number}_A" not in written:
                continue
            change, plain = scale * written[f"layer{number}_A"] @ written[f"layer{number}_B"], block.forward

            def forward(*args: Any, change: Tensor = change, plain: Any = plain, **options: Any) -> Any:
                out = plain(*args, **options)
                x = out[0] if isinstance(out, tuple) else out
                x = x + x @ change
                return (x, *out[1:]) if isinstance(out, tuple) else x

            block.forward = forward
            wrapped.append(block)
        try:
            yield
        finally:
            for block in wrapped:
                del block.forward
