"""Mean pooling against a loop over tokens."""

from __future__ import annotations

import torch

from gradmem.methods import MeanPool
from helpers import distance, make_method, random_tokens


def test_equals_a_loop_over_tokens() -> None:
    method = make_method(MeanPool, "llama", n_mem=3)
    context = random_tokens([2, 7, 9])
    written = method.write(context).memory.tensors["memory"]
    for row, length in enumerate(context.lengths.tolist()):
        parts: list[list[torch.Tensor]] = [[], [], []]
        for place, token in enumerate(context.ids[row, :length]):
            parts[place * 3 // length].append(method.backbone.embed(token))
        for vector, part in zip(written[row], parts, strict=True):
            wanted = torch.stack(part).mean(0) if part else torch.zeros_like(vector)
            assert distance(vector, wanted) < 1e-12 if part else not vector.any()
