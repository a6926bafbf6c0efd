"""RMT written down in the plainest way."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradmem.batch import Tokens
from gradmem.methods import RMT


def naive_control(method: RMT, name: str, batch: int) -> Tensor:
    none = torch.zeros(batch, 0, method.backbone.width, dtype=torch.float64)
    return method.control[name].expand(batch, -1, -1) if name in method.control else none


def naive_hidden(method: RMT, embeds: list[Tensor], mask: Tensor) -> Tensor:
    """Last hidden states of the whole model; position ids count what the mask lets through."""
    model = method.backbone.model
    output = model(
        inputs_embeds=torch.cat(embeds, dim=1),
        attention_mask=mask.long(),
        position_ids=(mask.long().cumsum(1) - 1).clamp_min(0),
        use_cache=False,
        output_hidden_states=True,
    )
    return output.hidden_states[-1]


def naive_write(method: RMT, options: dict[str, Any], context: Tokens) -> tuple[Tensor, Tensor]:
    """Memory of the last pass, and the reconstruction loss; pads stand between context and trailing vectors."""
    count, steps, m, c = len(context), options["write_steps"], options["n_mem"], options["n_ctrl"]
    start, end = naive_control(method, "write_start", count), naive_control(method, "write_end", count)
    memory, losses = method.initial_memory.expand(count, -1, -1), []
    for step in range(steps + options["reconstruction"]):
        vectors = memory
        if options["projection"] != "none":
            vectors = memory @ method.proj.weight.T + method.proj.bias
        embeds = method.backbone.model.get_input_embeddings()(context.ids)
        ones = torch.ones(count, m + 2 * c, dtype=torch.bool)
        mask = torch.cat([ones, context.mask, ones[:, : m + c]], dim=1)
        hidden = naive_hidden(method, [start, vectors, end, embeds, start, vectors], mask)
        if options["reconstruction"] and step:
            head = method.backbone.model.lm_head if options["write_head"] == "none" else method.write_head
            logits = head(hidden[:, m + 2 * c - 1 :][:, : context.ids.shape[1]])
            losses.append(F.cross_entropy(logits[context.mask], context.ids[context.mask]))
        if step < steps:
            new = hidden[:, -m:]
            if options["residual"] and step:
                new = memory + F.layer_norm(new, new.shape[-1:], method.norm.weight, method.norm.bias)
            memory = new
    return memory, sum(losses) / len(losses) if losses else torch.zeros(())


def naive_read(method: RMT, options: dict[str, Any], memory: Tensor, queries: Tokens) -> Tensor:
    """Logits from the first query token on."""
    count = len(queries)
    if options["projection"] == "proj_rw":
        memory = memory @ method.read_proj.weight.T + method.read_proj.bias
    prefix = [naive_control(method, "read_start", count), memory, naive_control(method, "read_end", count)]
    length = sum(part.shape[1] for part in prefix)
    embeds = method.backbone.model.get_input_embeddings()(queries.ids)
    mask = torch.cat([torch.ones(count, length, dtype=torch.bool), queries.mask], dim=1)
    return method.backbone.model.get_output_embeddings()(naive_hidden(method, [*prefix, embeds], mask)[:, length:])
