"""GradMem that starts from the context's own cache, slow and obvious: one sample, one head, one step at a time.

Keys are rotated by the model's own rotation when they stand at their new places, not turned from their old ones. Only
the parameters come from the method under test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from gradmem.batch import Batch
from naive_forms import _slots

RIDGE = 1e-4


@dataclass
class NaiveStarted:
    """`repeat` are the tokens that ask for the context itself, `before` those that stand before every context."""

    method: Any
    objectives: list[str]
    count: int
    steps: int
    before: list[int]
    repeat: list[int]

    def __post_init__(self) -> None:
        self.model = self.method.backbone.model
        self.config = self.model.config
        self.heads, self.each = self.config.num_key_value_heads, self.config.num_attention_heads
        self.each //= self.heads
        self.width = self.config.hidden_size // self.config.num_attention_heads

    def projections(self, ids: list[int]) -> list[dict[str, Tensor]]:
        """For each layer: queries, keys and values (heads, tokens, width) before any rotation."""
        found: list[dict[str, Tensor]] = [{} for _ in self.model.model.layers]
        hooks = [
            getattr(layer.self_attn, f"{name}_proj").register_forward_hook(
                lambda _, inputs, output, own=own, name=name: own.update({name: self.split(output[0])})
            )
            for own, layer in zip(found, self.model.model.layers, strict=True)
            for name in "qkv"
        ]
        self.model.set_attn_implementation("naive")
        self.model(input_ids=torch.tensor([ids]), use_cache=False)
        for hook in hooks:
            hook.remove()
        return found

    def split(self, output: Tensor) -> Tensor:
        return output.unflatten(-1, (-1, self.width)).transpose(0, 1)

    def rotated(self, tensor: Tensor, positions: Tensor) -> Tensor:
        """Rotate (tokens, width) to positions."""
        cos, sin = self.model.model.rotary_emb(tensor[None], positions[None])
        return apply_rotary_pos_emb(tensor[None, None], tensor[None, None], cos, sin)[0][0, 0]

    def out(self, layer: int, head: int, query: int) -> Tensor:
        """What the output projection does to a query head: (width, model width)."""
        at = (head * self.each + query) * self.width
        return self.model.model.layers[layer].self_attn.o_proj.weight[:, at : at + self.width].T

    def write(self, context: list[int]) -> tuple[list[list[dict[str, Tensor]]], list[Tensor]]:
        """What was written for each head of each layer, and the loss before each step."""
        start, length = self.projections([*self.before, *context]), len(self.before) + len(context)
        with torch.no_grad():
            repeated = self.projections([*self.before, *context, *self.repeat, *context])
        heads = [
            [self.head(layer, head, start[layer], repeated[layer], length) for head in range(self.heads)]
            for layer in range(len(start))
        ]
        velocity: list[Tensor] = []
        losses = []
        for step in range(self.steps):
            loss = sum(self.loss(name, heads, context) for name in self.objectives)
            tensors = [head[name] for layer in heads for head in layer for name in ("key", "value")]
            grads = list(torch.autograd.grad(loss, tensors, create_graph=True))
            number = 0
            for layer, own in enumerate(heads):
                for head, one in enumerate(own):
                    for name in ("key", "value"):
                        # A step of the move, in units of the size of what moves.
                        direction = grads[number] * one[f"{name}_size"]
                        if step:
                            direction = direction + self.method.momentum[step] * velocity[number]
                        velocity[number : number + 1] = [direction]
                        rate = self.method.log_inner_lr[name][step, layer, head].exp()
                        one[name] = one[name] - rate * direction * one[f"{name}_size"]
                        number += 1
            losses.append(loss)
        return heads, losses

    def head(
        self, layer: int, head: int, start: dict[str, Tensor], repeated: dict[str, Tensor], length: int
    ) -> dict[str, Any]:
        """The entries that count most for what the repetition looks for, and what it finds in the whole cache."""
        keys, values = repeated["k"][head], repeated["v"][head]
        every = torch.arange(len(keys))
        turned = self.rotated(keys, every)
        ranks, wanted = torch.zeros(length, dtype=keys.dtype), []
        for query in range(self.each):
            asked = self.rotated(repeated["q"][head * self.each + query], every)
            scores = (asked @ turned.T) * self.width**-0.5
            seen = scores.masked_fill(every > every[:, None], -torch.inf).softmax(-1)[length:]
            added = (values[:length] @ self.out(layer, head, query)).square().sum(-1).detach()
            ranks += seen[:, :length].square().mean(0) * added
            wanted.append(seen @ values)
        ranks[0] = torch.inf
        chosen = ranks.topk(self.count).indices.sort().values
        key = self.rotated(start["k"][head][chosen], torch.arange(self.count))
        value = start["v"][head][chosen]
        sizes = {f"{name}_size": t.square().mean().sqrt() for name, t in (("key", key), ("value", value))}
        later = {"keys": keys[length:], "values": values[length:], "queries": repeated["q"], "wanted": wanted}
        first = {"key": key.detach(), "value": value.detach()}
        return {"key": key, "value": value, **sizes, "later": later, "first": first, "place": (layer, head)}

    def loss(self, name: str, heads: list[list[dict[str, Any]]], context: list[int]) -> Tensor:
        if name == "reconstruction":
            logits = self.logits(heads, [*self.repeat, *context[:-1]])[len(self.repeat) - 1 :]
            return F.cross_entropy(logits, torch.tensor(context))
        errors = [self.error(own, own) / self.error(own, own["first"]) for layer in heads for own in layer]
        return sum(errors) / len(errors)

    def error(self, own: dict[str, Any], entries: dict[str, Tensor]) -> Tensor:
        """What the queries of the repetition miss if they stand right behind the entries."""
        later, (layer, head) = own["later"], own["place"]
        places = self.count + torch.arange(len(later["keys"]))
        keys = torch.cat([entries["key"], self.rotated(later["keys"], places)])
        values = torch.cat([entries["value"], later["values"]])
        metrics = [(part := self.out(layer, head, query).detach()) @ part.T for query in range(self.each)]
        ridge = RIDGE * torch.stack(metrics).diagonal(dim1=1, dim2=2).mean()
        total = 0.0
        for query, metric in enumerate(metrics):
            asked = self.rotated(later["queries"][head * self.each + query][-len(places) :], places)
            scores = (asked @ keys.T) * self.width**-0.5
            hidden = torch.arange(len(keys)) > (self.count + torch.arange(len(places)))[:, None]
            missed = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values - later["wanted"][query]
            total = total + ((missed @ metric) * missed).sum() + ridge * missed.square().sum()
        return total / (self.each * len(places) * self.width)

    def logits(self, heads: list[list[dict[str, Any]]], ids: list[int]) -> Tensor:
        """Logits after each token, behind the entries."""
        for layer, own in enumerate(heads):
            _slots[layer] = tuple(torch.stack([one[name] for one in own]) for name in ("key", "value"))
        self.model.set_attn_implementation("naive_slots")
        positions = self.count + torch.arange(len(ids))[None]
        found = self.model(input_ids=torch.tensor([ids]), position_ids=positions, use_cache=False).logits[0]
        _slots.clear()
        return found

    def outer_loss(self, batch: Batch) -> Tensor:
        """Mean read loss over all target tokens."""
        contexts = zip(batch.context.ids, batch.context.mask, strict=True)
        written = [self.write(ids[mask].tolist())[0] for ids, mask in contexts]
        losses = []
        for ids, mask, labels, row in zip(batch.queries.ids, batch.queries.mask, batch.labels, batch.rows, strict=True):
            logits = self.logits(written[row], ids[mask].tolist())
            losses += [-logits[t - 1].log_softmax(0)[label] for t, label in enumerate(labels[mask]) if label != -100]
        return sum(losses) / len(losses)
