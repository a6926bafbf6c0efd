"""In each of two processes: read and write with a model whose layers are split between them, by its own `tp_plan`."""

import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from gradmem import Backbone, GradMem, Tokens

folder = sys.argv[1]
contexts = Tokens.from_lists([[5, 6, 7, 8], [9, 10, 11]])
queries, rows = [[5, 6], [7], [9]], torch.tensor([0, 0, 1])


def method(**options: object) -> GradMem:
    torch.manual_seed(0)
    return GradMem(Backbone(AutoModelForCausalLM.from_pretrained(folder, **options)), n_mem=4, order="none")


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-4)


dist.init_process_group("gloo")
whole, split = method(), method(distributed_config=DistributedConfig(tp_plan="auto"))
split.initial_memory.data.copy_(whole.initial_memory.data)
halved = split.backbone.blocks[0].mlp.up_proj.weight.to_local()
assert 2 * halved.numel() == whole.backbone.blocks[0].mlp.up_proj.weight.numel()
with torch.no_grad():
    memory = whole.write(contexts, 3).memory
    asked = memory, Tokens.from_lists(queries), rows
    assert close(split.read(*asked), whole.read(*asked))
    options = {"pad_id": 0, "max_new_tokens": 5, "do_sample": False}
    assert split.generate(memory, queries, rows, **options) == whole.generate(memory, queries, rows, **options)
    assert close(split.write(contexts, 3).memory.tensors["memory"], memory.tensors["memory"])
    assert not close(split.initial_memory, memory.tensors["memory"])
